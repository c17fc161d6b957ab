"""One run's results as the report reads them: pytest-benchmark's JSON, each provider's extra_info one row."""

import hashlib
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FILE = "results.json"
OURS_NAMES = ("ours", "Interflow fused")
OF_A_RUN = ("machine_info", "benchmarks", "datetime", "run")
OF_A_ROW = ("case", "provider", "kind", "operator", "p50_us", "samples_us")


class UnreadableError(ValueError):
    """A file that is not one run's results; the text says which and what to do."""


@dataclass(frozen=True)
class Results:
    """rows: one for each case and provider, in the order they were measured."""

    machine: dict[str, Any]
    commit: str
    date: str
    run: dict[str, Any]
    rows: list[Row]
    digest: str  # of the file, for pictures to carry

    def ours(self, **about: Any) -> list[Row]:
        """The rows of our providers whose fields equal `about`."""
        return [row for row in self.rows if row["kind"] == "ours" and all(row.get(key) == value for key, value in about.items())]

    def comparable(self) -> list[Row]:
        """Our rows that the tables and charts of speed-ups show: no sweeps, no host times."""
        return [row for row in self.ours() if "sweep" not in row and row["operator"] != "host time"]

    def case(self, name: str) -> dict[str, Row]:
        """provider -> row of one case."""
        return {row["provider"]: row for row in self.rows if row["case"] == name}

    def base(self, row: Row) -> str | None:
        """The provider that does the same without Interflow, where the case has one."""
        return next((other["provider"] for other in self.case(row["case"]).values() if other["kind"] == "base"), None)

    def goals(self) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Each goal with the row it is judged on."""
        for row in self.rows:
            for goal in row.get("goals", ()):
                yield row, goal


def load(folder: Path) -> Results:
    """The results in `folder`, or of the file itself. Raises UnreadableError, one sentence, for a missing, cut or old file."""
    path = folder if folder.is_file() else folder / FILE
    data, digest = read_json(path, OF_A_RUN)
    for number, benchmark in enumerate(data["benchmarks"]):
        _check(path, benchmark.get("extra_info") if isinstance(benchmark, dict) else None, OF_A_ROW, f"benchmark {number}")
    rows = [benchmark["extra_info"] for benchmark in data["benchmarks"]]
    return Results(data["machine_info"], data.get("commit_info", {}).get("id", "unknown")[:10], data["datetime"][:10], data["run"], rows, digest)


def read_json(path: Path, keys: Sequence[str]) -> tuple[dict[str, Any], str]:
    """What a benchmark wrote to `path`, and the file's SHA-256. Raises UnreadableError where it is missing, cut, or has not all `keys`."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read ({error.strerror}); give a folder into which a run of the benchmarks wrote {path.name}") from None
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UnreadableError(f"{path} is not whole JSON ({error}); was the run cut short? Measure again") from None
    _check(path, data, keys, "the file")
    return data, hashlib.sha256(text).hexdigest()


def _check(path: Path, found: Any, keys: Sequence[str], place: str) -> None:
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing:
        raise UnreadableError(f"{path} is not a run of these benchmarks: {place} has no {missing[0]!r}; it may be of another version, so measure again")


def prose(text: str) -> str:
    """A paragraph of a page, its lines at most 118 columns."""
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def run_command(main: Callable[[], None]) -> None:
    """Runs a command line's main; results that cannot be read become one line and exit code 2."""
    try:
        main()
    except UnreadableError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


COMPILED = ("compiled", "max-autotune")
"""Providers that are as good as the torch.compile of a version of torch."""


def versioned(results: Results) -> Results:
    """The results with the torch version behind the name of everything compiled, as a reader should see it; a second time changes nothing.

    Two runs are compared by the names that they have without it.
    """
    version = results.machine["versions"]["torch"].split("+")[0]
    names = {name: f"{name} (torch {version})" for name in COMPILED}
    mark = f" (torch {version})"

    def named(name: str | None) -> str | None:
        return names.get(name, name) if name else name

    def shown(row: Row) -> Row:
        made = {**row, "provider": named(row["provider"])}
        if row.get("compiled") and not row["case"].endswith(mark):  # a whole network
            made["case"] = row["case"] + mark
        if "speed_up" in row:
            made["speed_up"] = {named(name): ratio for name, ratio in row["speed_up"].items()}
        if row.get("best_peer"):
            made["best_peer"] = named(row["best_peer"])
        if row.get("missing"):
            made["missing"] = {named(name): reason for name, reason in row["missing"].items()}
        return made

    return replace(results, rows=[shown(row) for row in results.rows])


def samples(row: Row) -> list[float]:
    """Microseconds a call, round by round."""
    return [float(word) for word in row["samples_us"].split()]


def headline(row: Row, base: str | None = None) -> tuple[str, list[float]] | None:
    """What ours is compared with first, and the ratio [median, low, high]: the plain network where Interflow itself is judged, else the best peer."""
    over = base if base is not None and row["operator"] in ("network", "stages with Interflow") else row["best_peer"]
    return (over, row["speed_up"][over]) if over else None


def verdict(ratio: list[float]) -> str:
    """ "faster", "slower", or "even" where the interval holds 1."""
    return "faster" if ratio[1] > 1 else "slower" if ratio[2] < 1 else "even"


def machine_line(results: Results) -> str:
    """Machine, software, date and commit in one sentence."""
    run = results.run
    return (
        f"{hardware(results.machine)}; {software(results.machine, 'torch', 'onnxruntime', 'openvino')}; {results.date}, commit {results.commit}; "
        f"{run['set']} set, timed for {run['timed_s']} s of {run['whole_s']} s.{busy(results)}"
    )


def hardware(m: Mapping[str, Any]) -> str:
    """What machine.describe found, in words."""
    where = f"{m['gpu']}, {m['cpu']}" if "gpu" in m else m["cpu"]
    clock = f" at {m['cpu_mhz']} MHz" if m.get("cpu_mhz") else ""
    return f"{where}{clock}, {m['cores']} cores, {m['threads']} threads, {m['last_level_cache_mib']} MiB last-level cache"


def software(m: Mapping[str, Any], *names: str) -> str:
    """The versions of those of `names` that are there."""
    return ", ".join(f"{name} {m['versions'][name]}" for name in names if name in m["versions"])


def busy(results: Results) -> str:
    """A warning where other processes took more than a tenth of a core while this was timed, else nothing."""
    return not_quiet(results.run["others_cores"], results.machine)


def not_quiet(others: float, m: Mapping[str, Any]) -> str:
    """The warning for so many cores that others took."""
    return f" Other processes used {others:g} of {m['cores']} cores meanwhile: not a quiet machine, not final." if others > 0.1 else ""
