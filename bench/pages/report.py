"""Results into report.md, report.html and pictures beside them: PYTHONPATH=bench python -m pages.report bench/results/NAME"""

import sys
from pathlib import Path

from pages.charts import charts
from pages.drawing import Chart
from pages.page import page
from pages.results import Results, headline, load, machine_line, run_command, verdict
from pages.tables import tables

MADE_BY = {"quick": "bench", "full": "bench-full", "gpu": "gpu", "gpu-full": "gpu-full"}  # set -> target
PICTURES = {"overview": "speed.png"}  # chart -> file for the README


def facts(results: Results) -> list[tuple[str, str]]:
    """What the top of the page counts: (figure, of what)."""
    goals = [goal["reached"] for _, goal in results.goals()]
    found = [headline(row, results.base(row)) for row in results.comparable()]
    verdicts = [verdict(ratio) for _, ratio in filter(None, found)]
    counted = [(f"{sum(goals)} of {len(goals)}", "targets reached")] if goals else []
    return [*counted, *((str(verdicts.count(word)), f"cases {word}") for word in ("faster", "even", "slower"))]


def markdown(results: Results) -> str:
    """The tables, as report.md has them."""
    lines = ["# What it costs, and beside what", "", machine_line(results), ""]
    lines += [f"Made by `make {MADE_BY[results.run['set']]}`; `report.html` beside this file has the charts.", ""]
    return "\n".join(lines) + "\n" + "\n".join(table.markdown() for table in tables(results))


def draw_pictures(results: Results, made: list[Chart], folder: Path) -> None:
    for chart in made:
        if chart.key in PICTURES:
            chart.png(folder / PICTURES[chart.key], results.digest)


def main(folder: Path) -> None:
    results = load(folder)
    made = charts(results)
    (folder / "report.md").write_text(markdown(results))
    (folder / "report.html").write_text(page(results, tables(results), made, facts(results)))
    draw_pictures(results, made, folder)
    print("; ".join(f"{figure} {what}" for figure, what in facts(results)))
    print(f"{folder / 'report.md'}\n{folder / 'report.html'}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    run_command(lambda: main(Path(sys.argv[1])))
