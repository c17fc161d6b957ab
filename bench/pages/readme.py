"""The README's section on speed, written from committed results: make bench-readme"""

import sys
from pathlib import Path

from pages.results import Results, Row, busy, headline, load, prose, run_command, verdict, versioned

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
SKIPPED = ("B=1 warm", "with shift", "five boundaries")


def section(results: Results, folder: str) -> str:
    """What stands between the marks, the marks included. `folder`: the results' path as the README links it."""
    results = versioned(results)
    m = results.machine
    reached = [goal["reached"] for _, goal in results.goals()]
    lines = [
        BEGIN,
        prose(
            f"Measured on {m['cores']} cores of an {m.get('gpu', m['cpu'])} with torch {m['versions']['torch']} on {results.date}. "
            "Ratio: the other's time over "
            "ours, median of paired rounds with its 95 % interval. Every peer got the same inputs and its results were checked first." + busy(results)
        ),
        "",
        "| with Interflow, fused, against | ratio | |",
        "|---|---|---|",
        *(_line(results, row) for row in shown(results) if results.base(row) and headline(row, results.base(row))[0] == results.base(row)),  # type: ignore[index]
        "",
        "| by itself, against the best peer | ratio | share of a plain read |",
        "|---|---|---|",
        *(_line(results, row) for row in shown(results) if headline(row, results.base(row))[0] == row["best_peer"]),  # type: ignore[index]
        "",
        "<!-- --8<-- [end:cpu] -->",  # up to here the site shows it, docs/guide/performance.md
        f'<img src="{folder}/speed.png" width="480" alt="Speed-up of every case with its interval">',
        "",
        prose(
            f"All cases, the losing ones too: `{folder}/report.md`; charts: `{folder}/report.html`. Targets reached: {sum(reached)} of {len(reached)}. "
            "`make bench` measures anew; `docs/benchmarks.md` says how to read it."
        ),
        END,
    ]
    return "\n".join(lines)


def shown(results: Results) -> list[Row]:
    """The rows of the README, slower ones included."""
    return [row for row in results.comparable() if headline(row, results.base(row)) and not any(word in row["case"] for word in SKIPPED)]


def _line(results: Results, row: Row) -> str:
    found = headline(row, results.base(row))
    assert found is not None
    over, ratio = found
    share = row["share"].get("read")
    last = f"{share[0]:.2f}" if share else {"faster": "faster", "slower": "slower", "even": "the interval holds 1"}[verdict(ratio)]
    return f"| {row['case']}, against {over} | {ratio[0]:.2f}x [{ratio[1]:.2f}, {ratio[2]:.2f}] | {last} |"


def rewritten(readme: str, new: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """The README with the section between the marks replaced; ValueError where they are missing."""
    begin, end = marks
    if begin not in readme or end not in readme:
        raise ValueError(f"README.md must have {begin} and {end}")
    return readme[: readme.index(begin)] + new + readme[readme.index(end) + len(end) :]


def main(folder: str) -> None:
    path = ROOT / "README.md"
    path.write_text(rewritten(path.read_text(), section(load(Path(folder)), folder.rstrip("/"))))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    run_command(lambda: main(sys.argv[1]))
