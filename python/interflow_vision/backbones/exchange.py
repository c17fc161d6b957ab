"""How modules inside a backbone hand something to the network around them, for the length of one forward.

A map that a hook has seen, or a mean that a stage's end has computed, must reach the head although the backbone's own code
passes on neither. It goes into a parcel that the network opens before it calls its backbone and closes after. Parcels are
kept for each thread, so networks run in several threads; nothing is kept between forwards; and what runs while no parcel is
open, as the second forward of activation checkpointing does, gives nothing away.
"""

from threading import get_ident
from typing import Any

import torch

Parcel = dict[tuple[str, int], Any]
"""(kind, stage) -> what was handed over."""


class Exchange:
    """Parcels of one network. Copies and pickles are empty: whatever is open belongs to a forward that runs now."""

    def __init__(self) -> None:
        self._open: dict[int, list[Parcel]] = {}  # by thread
        self._traced: list[Parcel] = []  # the same while a compiler or exporter runs the code, in which threads have no number

    def open(self) -> Parcel:
        """A new parcel, which takes what is put in until it is closed."""
        parcel: Parcel = {}
        if torch.compiler.is_compiling():
            self._traced.append(parcel)
        else:
            self._open.setdefault(get_ident(), []).append(parcel)
        return parcel

    def close(self) -> None:
        """Closes this thread's newest parcel."""
        if torch.compiler.is_compiling():
            self._traced.pop()
            return
        mine = self._open[get_ident()]
        mine.pop()
        if not mine:
            del self._open[get_ident()]

    def put(self, kind: str, stage: int, value: Any) -> None:
        """Into this thread's newest parcel; dropped where none is open."""
        parcels = self._traced if torch.compiler.is_compiling() else self._open.get(get_ident())
        if parcels:
            parcels[-1][kind, stage] = value

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Exchange":
        return memo.setdefault(id(self), Exchange())
