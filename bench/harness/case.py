"""What one row of the report measures: a case, its providers, and the plan of it that is known before anything is built."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from .goals import Goal

Kind = Literal["ours", "twin", "peer", "base", "limit"]
Family = Literal["wall", "device"]


class Unavailable(Exception):
    """A provider that cannot run here; the message is the reason that the report gives."""


@dataclass
class Provider:
    """One way to do the work. `call` takes the index of an input set and returns its results, which the gate looks at.

    kind: "ours"; its "twin", our operators in another language, judged by goals of its own; a "peer" that a user would pick for the same work; the
        "base" that does without it, an Interflow network's plain one; or a "limit": plain traffic of `bytes`, which no result comes from.
    result: what the gate looks at instead of call(0), for calls whose effect is elsewhere (a training step).
    saved: bytes kept for backward, measured once.
    around: under which it is called, entered once for many calls.
    """

    call: Callable[[int], Any]
    kind: Kind
    bytes: int = 0
    result: Callable[[], Any] | None = None
    saved: Callable[[], int] | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Case:
    """One comparison on the same inputs.

    family: "wall", what a call costs a user, dispatch and waiting included; "device", what the device does: on a GPU replayed graphs
        between events, on a CPU calls over rotating inputs that no cache holds ("cold") or over one set ("warm").
    about: what the report sorts by: pass, dtype, layout, batch, pixels, classes, inputs, sweep.
    sets: input sets that take turns. bytes: what the work cannot do without. repeats: calls inside one `call`.
    expected: the results that the gate demands of ours and the peers, within `tolerance` of their largest value, or by_norm of their norm.
    goals: of the design, for the provider they name.
    """

    operator: str
    name: str
    family: Family
    providers: dict[str, Provider]
    about: dict[str, Any]
    sets: int = 1
    bytes: int = 0
    images: int = 0
    repeats: int = 1
    expected: Callable[[], Sequence[Tensor]] | None = None
    tolerance: float = 1e-5
    by_norm: bool = False
    goals: dict[str, list[Goal]] = field(default_factory=dict)
    memory: bool = False
    missing: dict[str, str] = field(default_factory=dict)  # provider -> why it cannot run here


@dataclass(frozen=True)
class Plan:
    """A case before it is built: `build` allocates and compiles, `providers` are the names that it will have or miss.

    seconds: of timing. setup: what building, compiling and checking are thought to take: no case is begun that the budget has no time for.
    """

    name: str
    providers: tuple[str, ...]
    build: Callable[[], Case]
    seconds: float = 3.0
    setup: float = 0.0


def distinct(plans: Iterable[Plan]) -> Iterator[Plan]:
    """The first plan of each name."""
    found: dict[str, Plan] = {}
    for plan in plans:
        found.setdefault(plan.name, plan)
    yield from found.values()
