"""Which stages are taken: the default, and what `stages=` says, checked; each refusal names the nearest valid names."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

MOST = 16
"""Stages that a head takes."""


def default_places(count: int, reductions: Sequence[Any] = ()) -> tuple[int, ...]:
    """Of `count` maps in order of depth: the last four, since the first of five is the stem's, the largest of all.

    Blocks of a network that keeps its size, such as ViT, all of one reduction or more than six: four of them, evenly spread, the last one too.
    """
    keeps_size = count > 4 and len(reductions) == count and len(set(reductions)) == 1
    if count <= 6 and not keeps_size:
        return tuple(range(max(0, count - 4), count))
    return tuple(count * quarter // 4 - 1 for quarter in (1, 2, 3, 4))


def requested(stages: Any) -> list[int] | list[str] | None:
    """`stages` as a list of indices or of names; None for the default."""
    if stages is None:
        return None
    if isinstance(stages, (str, bytes)) or not isinstance(stages, Sequence):
        raise TypeError(f"stages must be a sequence of indices or of names, or None, got {stages!r}")
    each = list(stages)
    if not (all(isinstance(s, int) and not isinstance(s, bool) for s in each) or all(isinstance(s, str) for s in each)):
        raise TypeError(f"stages must be all indices or all names, got {each!r}")
    if not 1 <= len(each) <= MOST:
        raise ValueError(f"stages must name 1 to {MOST} stages, got {len(each)}")
    _distinct(each)
    return each


def _distinct(each: Sequence[Any]) -> None:
    for i, stage in enumerate(each):
        if stage in each[:i]:
            raise ValueError(f"stages must differ from each other, got {stage!r} twice")


def places(stages: list[int], count: int) -> tuple[int, ...]:
    """Indices among `count` maps, negative ones from the end."""
    for stage in stages:
        if not -count <= stage < count:
            raise ValueError(f"stages must be indices from {-count} to {count - 1} of the backbone's {count} maps, got {stage}")
    found = tuple(stage % count for stage in stages)
    _distinct(found)
    return found


def known(stages: Iterable[str], valid: Sequence[str], what: str) -> None:
    """ValueError for a name that is not among the valid ones."""
    for stage in stages:
        if stage not in valid:
            raise ValueError(f"stages: the backbone has no {what} {stage!r}{nearest(stage, valid)}")


def nearest(name: str, valid: Sequence[str]) -> str:
    """The end of a sentence: names like this one, else the first few; nothing where there are none."""
    last = name.rpartition(".")[2]
    close = difflib.get_close_matches(name, valid, 3, 0.5) or [v for v in valid if v.rpartition(".")[2] == last][:3]
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    few = [v for v in valid if v][:5]
    return f"; there are {', '.join(map(repr, few))}{', ...' if len(valid) > len(few) else ''}" if few else ""
