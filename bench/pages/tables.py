"""The report's tables: what each shows, as cells that Markdown and HTML render alike."""

from collections.abc import Sequence
from dataclasses import dataclass

from harness.stats import exponent

from .results import Results, Row, headline, verdict, versioned

Cell = tuple[str, float | str]  # what is shown, what it sorts by
NOTHING: Cell = ("-", -1.0)


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", self.note, ""]
        lines += ["| " + " | ".join(self.header) + " |", "|" + "---|" * len(self.header)]
        lines += ["| " + " | ".join(shown for shown, _ in row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def tables(results: Results) -> list[Table]:
    """All of them, those that a reader looks for first in front; empty ones left out."""
    results = versioned(results)
    made = (targets(results), speed(results), without(results), networks(results), memory(results), growth(results), absent(results), everything(results))
    return [table for table in made if table.rows]


def targets(results: Results) -> Table:
    rows = []
    for row, goal in sorted(results.goals(), key=lambda pair: pair[1]["reached"]):
        spread = f"{goal['value']:.2f} {goal['unit']} [{goal['low']:.2f}, {goal['high']:.2f}]"
        name = row["case"] if row["operator"] != "host time" else f"{row['provider']}, tiny inputs, inference mode"
        rows.append([_text(name), _text(goal["text"]), (spread, goal["value"]), ("yes" if goal["reached"] else "**no**", goal["reached"])])
    reached = sum(goal["reached"] for _, goal in results.goals())
    note = f"{reached} of {len(rows)} reached, those that were not first. Medians of paired rounds with their 95 % intervals."
    return Table("Targets", note, ("case", "target", "measured", "reached"), rows)


def speed(results: Results) -> Table:
    rows = []
    for row in results.comparable():
        best = row["best_peer"]
        if best is None:
            continue
        ratio = row["speed_up"][best]
        others = {name: r for name, r in row["speed_up"].items() if name not in (best, results.base(row))}
        rows.append(
            [
                _text(row["case"]),
                _times(row),
                (_ratio(ratio) + f" {best}", ratio[0]),
                _text(verdict(ratio)),
                _text(", ".join(f"{r[0]:.2f}x {name}" for name, r in others.items()) or "-"),
                _share(row, "read"),
                _share(row, "copy"),
                _number(row, "gb_per_s"),
                _number(row, "images_per_s"),
            ]
        )
    rows.sort(key=lambda cells: cells[2][1])
    lost = sum(row[3][0] == "slower" for row in rows)
    note = (
        f"The smallest speed-ups first; {lost} of {len(rows)} cases are slower than their best peer. Speed-up: time of the peer / ours, median of paired "
        "rounds [95 % interval]; faster or slower only where the interval leaves out 1. "
        "Shares: bytes a second beside a plain read (`sum`) or copy of the same maps. "
        "GB/s: of the bytes that the work cannot do without."
    )
    header = ("case", "ours, ms [p20, p80]", "speed-up over the best peer", "verdict", "over the others", "share of read", "share of copy", "GB/s", "images/s")
    return Table("Against what else computes the same", note, header, rows)


def without(results: Results) -> Table:
    rows = []
    for row in results.comparable():
        base = results.base(row)
        if base is not None:
            ratio, other = row["speed_up"][base], results.case(row["case"])[base]
            naive = row["speed_up"].get(row["best_peer"])
            last = (_ratio(naive), naive[0]) if naive else NOTHING
            rows.append([_text(row["case"]), _times(row), _times(other), (_ratio(ratio), ratio[0]), _text(verdict(ratio)), last])
    header = ("case", "ours with Interflow, ms", "without Interflow, ms", "without / ours", "verdict", "Interflow in plain PyTorch / ours")
    note = "Above 1, the network or the stage is faster with fused Interflow than the plain one without it."
    return Table("With Interflow against without", note, header, rows)


def networks(results: Results) -> Table:
    rows = []
    for row in results.rows:
        if row["operator"] == "network":
            plain = row["speed_up"].get("plain")
            ratio = (_ratio(plain), plain[0]) if plain else NOTHING
            counted = (_number(row, "images_per_s"), _mib(row, "peak_bytes"), _number(row, "kernels"))
            rows.append([_text(row["case"]), _text(row["provider"]), (f"{row['p50_us'] / 1e3:.4g}", row["p50_us"]), *counted, ratio])
    note = "Of a call: a training step with its optimizer, or an inference. Launches: kernels, copies and fills on a GPU. Peak: above what was there before."
    return Table("Whole networks", note, ("case", "network", "ms", "images/s", "peak, MiB", "launches", "plain / this"), rows)


def memory(results: Results) -> Table:
    rows = []
    for row in results.rows:
        if row.get("saved_bytes") is not None or row.get("peak_bytes") is not None:
            rows.append([_text(row["case"]), _text(row["provider"]), _mib(row, "saved_bytes"), _mib(row, "peak_bytes")])
    note = (
        "Kept for backward: what autograd saves of one forward pass, inputs and parameters not counted. "
        "Peak: how far one call's memory rises above what was there before it."
    )
    return Table("Memory", note, ("case", "provider", "kept for backward, MiB", "peak, MiB"), rows)


def sweeps(results: Results) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """(operator, letter) -> provider -> rows by growing x."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in results.rows:
        if "sweep" in row:
            found.setdefault((row["operator"], row["sweep"]), {}).setdefault(row["provider"], []).append(row)
    return found


def fitted(rows: Sequence[Row]) -> float:
    """e in time ~ x^e over one sweep."""
    return exponent([row["x"] for row in rows], [row["p50_us"] for row in rows])


def growth(results: Results) -> Table:
    rows = []
    for (operator, letter), providers in sweeps(results).items():
        given = [row["x"] for row in next(iter(providers.values()))]
        cells = [(f"{e:.2f}", e) for e in (fitted(providers[name]) for name in ("ours", "eager"))]
        rows.append([_text(operator.removeprefix("complexity ")), _text(letter), _text(", ".join(map(str, given))), *cells])
    note = "e in time ~ x^e, fitted over all points: near 0 where something else costs more, near 1 where the time is that of the memory traffic."
    return Table("How cost grows", note, ("operator", "x", "values", "ours", "eager"), rows)


def absent(results: Results) -> Table:
    reasons = {(name, reason) for row in results.ours() for name, reason in row["missing"].items()}
    return Table("What could not run here", "Peers without a row above, and why.", ("peer", "reason"), [[_text(n), _text(r)] for n, r in sorted(reasons)])


def everything(results: Results) -> Table:
    header = ("case", "provider", "kind", "p20, ms", "p50, ms", "p80, ms", "rounds", "GB/s", "host time of a call, us", "kernels", "cores that others took")
    rows = []
    for row in results.rows:
        spread = [(f"{row[key] / 1e3:.4g}", row[key]) for key in ("p20_us", "p50_us", "p80_us")]
        rows.append(
            [
                _text(row["case"]),
                _text(row["provider"]),
                _text(row["kind"]),
                *spread,
                _number(row, "rounds"),
                _number(row, "gb_per_s"),
                _number(row, "host_us"),
                _number(row, "kernels"),
                _number(row, "others_cores"),
            ]
        )
    return Table("Every measurement", "Milliseconds a call. Do not trust a case while which others took more than a tenth of a core.", header, rows)


def _text(text: str) -> Cell:
    return text, text


def _ratio(ratio: Sequence[float]) -> str:
    return f"{ratio[0]:.2f}x [{ratio[1]:.2f}, {ratio[2]:.2f}]"


def _times(row: Row) -> Cell:
    return f"{row['p50_us'] / 1e3:.4g} [{row['p20_us'] / 1e3:.4g}, {row['p80_us'] / 1e3:.4g}]", row["p50_us"]


def _share(row: Row, limit: str) -> Cell:
    share = row["share"].get(limit)
    return (f"{share[0]:.2f}", share[0]) if share else NOTHING


def _number(row: Row, key: str) -> Cell:
    value = row.get(key)
    return (f"{value:g}", value) if value is not None else NOTHING


def _mib(row: Row, key: str) -> Cell:
    value = row.get(key)
    return (f"{value / 2**20:.1f}", value) if value is not None else NOTHING


__all__ = ["Table", "fitted", "headline", "sweeps", "tables"]
