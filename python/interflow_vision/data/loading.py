"""A DataLoader that can go on in the middle of an epoch with the batches that were still to come."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from ..processes import gathered, own
from . import random_states


class ResumableLoader(DataLoader[Any]):
    """DataLoader for data sets with a length, whose pass over the data continues where a checkpoint was written.

    Lightning saves and loads the state of such a loader by itself. A pass that goes on starts with the generators' states
    of its first start and reads the batches that were used already once more, without giving them out: so order, workers'
    seeds and augmentation are those of the unbroken pass, whatever the data set and the number of workers.
    Workers must not be persistent: the state of one that has lived through other epochs cannot be made again.

    A pass begins with its first batch, not with iter(): Lightning tells the sampler the epoch in between.
    """

    _start: dict[str, Any] | None = None  # generators' states when the pass began
    _given = 0  # batches of the pass that were given out
    _goes_on: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._one_pass()

    def _one_pass(self) -> Iterator[Any]:
        goes_on, self._goes_on = self._goes_on, None
        skipped, then = 0, None
        if goes_on is not None:
            skipped, start = goes_on["batches"], own(goes_on["start"])
            if start is not None:
                then = random_states.states()
                random_states.restore(start)
        self._start, self._given = random_states.states(), skipped
        batches = iter(super().__iter__())
        for _ in range(skipped):
            next(batches)
        if then is not None:
            random_states.restore(then)
        for batch in batches:
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """How far the pass is; every process must call it."""
        start = gathered(random_states.states() if self._start is None else self._start)
        return {"batches": self._given, "start": start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next pass goes on from there."""
        self._goes_on = state
