"""How `interflow predict` writes what it found: lines with tabs, CSV or JSON; with the best class or the best few."""

import csv
import json
import sys
from collections.abc import Sequence
from typing import Any, TextIO

FORMATS = ("tsv", "csv", "json")
"""tsv: file, class, probability of each of the best few, separated by tabs.  csv: a table with a head.  json: an object a line (JSON Lines)."""

Found = Sequence[tuple[str, float]]
"""Class and probability, the best first."""


class Writer:
    """Writes a line for each image, as soon as it is known.

    Args:
        kind: one of FORMATS.
        stream: where to; default stdout.
    """

    def __init__(self, kind: str, stream: TextIO | None = None) -> None:
        self.kind = kind
        self.stream = sys.stdout if stream is None else stream
        self._csv: Any = None

    def write(self, name: str, found: Found) -> None:
        """An image and its classes."""
        if self.kind == "json":
            line = {"file": name, "classes": [{"class": label, "probability": round(p, 6)} for label, p in found]}
            self.stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        elif self.kind == "csv":
            if self._csv is None:
                self._csv = csv.writer(self.stream, lineterminator="\n")
                numbers = [""] if len(found) == 1 else [str(i) for i in range(1, len(found) + 1)]
                self._csv.writerow(["file", *(f"{what}{number}" for number in numbers for what in ("class", "probability"))])
            self._csv.writerow([name, *(cell for label, p in found for cell in (label, f"{p:.4f}"))])
        else:
            self.stream.write("\t".join([name, *(cell for label, p in found for cell in (label, f"{p:.4f}"))]) + "\n")

    def flush(self) -> None:
        """So that a reader of a pipe has what is known."""
        self.stream.flush()


class Progress:
    """Images and images a second on stderr, where that is a terminal and stdout is none; tqdm, which Lightning brings along."""

    def __init__(self) -> None:
        self._bar: Any = None
        if sys.stderr.isatty() and not sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(unit=" images", file=sys.stderr)

    def add(self, images: int) -> None:
        """So many are done."""
        if self._bar is not None:
            self._bar.update(images)

    def close(self) -> None:
        """Leaves the last count."""
        if self._bar is not None:
            self._bar.close()
