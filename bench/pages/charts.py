"""The report's charts. Blue is ours, orange the peers, red what ours loses; whiskers are 95 % intervals."""

from collections.abc import Iterator

import matplotlib.pyplot as plt
from harness.stats import crossover
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .drawing import COLOURS, EVEN, LOST, OURS, PEER, Chart, ratio_axis, rows_figure, short
from .results import Results, Row, headline, verdict, versioned
from .tables import fitted, sweeps


def charts(results: Results) -> list[Chart]:
    """All of them; a chart without data is left out."""
    results = versioned(results)
    made = [overview(results), *by_batch(results), shares(results), memory(results), *complexity(results)]
    return [chart for chart in made if chart is not None]


def overview(results: Results) -> Chart | None:
    """Speed-up of every case over what it is compared with first, smallest at the bottom."""
    points = []
    for row in results.comparable():
        found = headline(row, results.base(row))
        if found is not None:
            points.append((row["case"], *found))
    points.sort(key=lambda point: point[2][0])

    def draw() -> Figure:
        figure, axes = rows_figure([f"{short(name)}, vs {over}" for name, over, _ in points], 0.42)
        for y, (_, _, (median, low, high)) in enumerate(points):
            colour = COLOURS[verdict([median, low, high])]
            axes.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="round")
            axes.plot(median, y, "o", color=colour, markersize=5)
            axes.annotate(f"{median:.2f}x", (high, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8, color=colour)
        axes.axvline(1, color="black", linewidth=1)
        ratio_axis(axes)
        axes.set_xlabel("times as fast; left of 1 ours loses")
        return figure

    caption = (
        "Each case against the faster of its peers; whole stages and networks with Interflow against the plain ones without it. "
        "Whiskers: 95 % interval. Grey: it holds 1. Red: slower."
    )
    return Chart("overview", "Speed-up at a glance", caption, draw) if points else None


def by_batch(results: Results) -> Iterator[Chart | None]:
    """Speed-up over batch size, a chart for each operator and pass with at least two batches, a line for each layout and dtype."""
    groups: dict[tuple[str, str, int], dict[tuple[str, str], list[Row]]] = {}
    for row in results.comparable():
        if (
            row["operator"] in ("interflow_head", "stage_tap", "folded head")
            and row.get("inputs") == "cold"
            and not row.get("shift")
            and row.get("stages") != "five boundaries"
        ):
            lines = groups.setdefault((row["operator"], row["pass"], row["pixels"]), {})
            lines.setdefault((row["dtype"], row["layout"]), []).append(row)
    for (operator, direction, pixels), lines in groups.items():
        lines = {key: sorted(rows, key=lambda row: row["batch"]) for key, rows in lines.items() if len(rows) > 1}
        if lines:
            yield _batch_chart(f"{operator}, {direction}, {pixels} px", lines)


def _batch_chart(title: str, lines: dict[tuple[str, str], list[Row]]) -> Chart:
    crossings = []
    for (dtype, layout), rows in lines.items():
        at = crossover([row["batch"] for row in rows], [row["speed_up"][row["best_peer"]][0] for row in rows])
        first = rows[0]["speed_up"][rows[0]["best_peer"]][0]
        never = "at no batch measured" if first >= 1 else f"from B = {rows[0]['batch']}, the smallest"
        crossings.append(f"{dtype} {layout} " + (never if at is None else f"from B = {at:.0f}"))

    def draw() -> Figure:
        figure, axes = plt.subplots(figsize=(4.4, 3.3), layout="constrained")
        for (key, rows), colour in zip(lines.items(), (OURS, PEER, "#2a8c4a", "#8a4fbf"), strict=False):
            x = [row["batch"] for row in rows]
            ratios = [row["speed_up"][row["best_peer"]] for row in rows]
            middle = [r[0] for r in ratios]
            errors = [[r[0] - r[1] for r in ratios], [r[2] - r[0] for r in ratios]]
            axes.errorbar(x, middle, yerr=errors, fmt="o-", color=colour, capsize=3, markersize=4, label=" ".join(key))
        axes.axhline(1, color="black", linewidth=1)
        axes.set_ylim(bottom=0)
        axes.axhspan(0, 1, color=LOST, alpha=0.07)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.set_xlabel("batch size B")
        axes.set_ylabel("times as fast as the best peer")
        axes.legend(frameon=False)
        return figure

    key = "batch-" + "".join(c if c.isalnum() else "-" for c in title)
    return Chart(key, f"Speed-up by batch: {title}", "Where ours stops being faster (crossover): " + "; ".join(crossings) + ". Whiskers: 95 % interval.", draw)


def shares(results: Results) -> Chart | None:
    """Bytes a second beside the plain read: of ours and of the best peer."""
    rows = [row for row in results.comparable() if "read" in row["share"] and row["best_peer"]]

    def draw() -> Figure:
        figure, axes = rows_figure([short(row["case"]) for row in reversed(rows)], 0.42)
        for y, row in enumerate(reversed(rows)):
            peer = results.case(row["case"])[row["best_peer"]]
            axes.barh(y - 0.02, row["share"]["read"][0], 0.2, color=OURS, label="ours" if y == 0 else None)
            axes.barh(y - 0.24, peer["share"]["read"][0], 0.2, color=PEER, label="best peer" if y == 0 else None)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xlabel("share of the bytes a second of a plain read")
        figure.legend(frameon=False, loc="outside upper center", ncols=2)
        return figure

    caption = "Bytes that the work cannot do without, per second, beside a plain sum over the same maps. A pass that writes too cannot reach 1."
    return Chart("shares", "Share of the limit", caption, draw) if rows else None


def memory(results: Results) -> Chart | None:
    """Kept for backward: ours, the peer's and, where there is one, the base's."""
    rows = [row for row in results.comparable() if row.get("saved_bytes") is not None]

    def draw() -> Figure:
        figure, axes = rows_figure([short(row["case"]) for row in reversed(rows)], 0.56)
        labels = set()
        for y, row in enumerate(reversed(rows)):
            others = [r for r in results.case(row["case"]).values() if r["kind"] in ("peer", "base") and r.get("saved_bytes") is not None]
            bars = [("ours", OURS, row), *((r["provider"], PEER if r["kind"] == "peer" else EVEN, r) for r in others)]
            height = 0.6 / len(bars)
            for i, (name, colour, r) in enumerate(bars):
                label = {OURS: "ours", PEER: "in plain PyTorch", EVEN: "without Interflow"}[colour]
                width, place = r["saved_bytes"] / 2**20, y + 0.2 - height * (i + 0.5)
                axes.barh(place, width, height * 0.9, color=colour, label=None if label in labels else label)
                shown = f"{width:.3g}" + (f" ({name})" if len(others) > 1 and colour == PEER else "")
                axes.annotate(shown, (width, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=6.5)
                labels.add(label)
        axes.set_xlabel("MiB kept for backward")
        axes.set_xlim(right=axes.get_xlim()[1] * 1.12)
        figure.legend(frameon=False, loc="outside upper center", ncols=3, fontsize=8)
        return figure

    caption = "What autograd saves of one forward pass; inputs and parameters are not counted."
    return Chart("memory", "Memory kept for backward", caption, draw) if rows else None


def complexity(results: Results) -> Iterator[Chart]:
    """Time over one letter, both axes logarithmic, with the fitted exponent."""
    for (operator, letter), providers in sweeps(results).items():
        yield _complexity_chart(operator.removeprefix("complexity "), letter, providers)


def _complexity_chart(operator: str, letter: str, providers: dict[str, list[Row]]) -> Chart:
    def draw() -> Figure:
        figure, axes = plt.subplots(figsize=(4.4, 3.0), layout="constrained")
        for name, colour in (("ours", OURS), ("eager", PEER)):
            rows = providers[name]
            x, y = [row["x"] for row in rows], [row["p50_us"] for row in rows]
            errors = [[row["p50_us"] - row["p20_us"] for row in rows], [row["p80_us"] - row["p50_us"] for row in rows]]
            axes.errorbar(x, y, yerr=errors, fmt="o-", color=colour, capsize=3, markersize=4, label=f"{name}: {letter}^{fitted(rows):.2f}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(x, [str(v) for v in x])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.set_xlabel(letter)
        axes.set_ylabel("microseconds a call")
        axes.legend(frameon=False)
        return figure

    key = f"growth-{operator}-" + "".join(c for c in letter if c.isalnum())
    return Chart(key, f"Cost of the {operator} over {letter}", "The exponent is fitted over all points. Whiskers: 20th to 80th percentile.", draw)
