"""The report as one HTML file that needs nothing else: sortable tables, inline charts, readable on a phone."""

from collections.abc import Sequence
from html import escape

from .drawing import Chart
from .results import Results, machine_line
from .tables import Table

CSS = """
:root { --ink: #1c1f23; --soft: #5b636d; --line: #e1e4e8; --blue: #1f5fbf; --red: #c0262d; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: var(--ink); background: #fff; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p { max-width: 50rem; margin: .4rem 0; }
.soft { color: var(--soft); font-size: .875rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: .8rem 0; font-size: .9rem; }
a { color: var(--blue); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.fact { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .8rem; }
.fact b { display: block; font-size: 1.5rem; line-height: 1.2; }
.charts { columns: 21rem; column-gap: 1.6rem; }
figure { margin: 0 0 1.6rem; break-inside: avoid; }
figure svg { width: 100%; height: auto; display: block; }
figure h3 { font-size: 1rem; margin: .2rem 0; }
figcaption { color: var(--soft); font-size: .825rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; max-height: 80vh; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td { min-width: 5.5rem; } td:first-child { min-width: 11rem; }
th { position: sticky; top: 0; background: #f5f6f8; cursor: pointer; white-space: nowrap; user-select: none; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--blue); }
th[aria-sort=ascending] button::after { content: " \\25b2"; } th[aria-sort=descending] button::after { content: " \\25bc"; }
tr.lost td { background: #fdeeee; } tr.lost td:first-child { box-shadow: inset 3px 0 var(--red); }
input { font: inherit; padding: .35rem .6rem; border: 1px solid var(--line); border-radius: .4rem; width: min(100%, 24rem); margin: .3rem 0 .5rem; }
@media (max-width: 40rem) { body { font-size: 15px; padding: .7rem; } th, td { padding: .3rem .45rem; } }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  for (const [column, head] of [...table.tHead.rows[0].cells].entries()) {
    head.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = row => row.cells[column].dataset.key;
      const text = (a, b) => key(a).localeCompare(key(b), undefined, {numeric: true});
      const order = (a, b) => { const d = Number(key(a)) - Number(key(b)); return isNaN(d) ? text(a, b) : d; };
      body.append(...[...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)));
    });
  }
}
for (const input of document.querySelectorAll("input[data-table]")) {
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\\s+/);
    for (const row of document.getElementById(input.dataset.table).tBodies[0].rows)
      row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  });
}
"""


def page(results: Results, tables: Sequence[Table], charts: Sequence[Chart], facts: Sequence[tuple[str, str]]) -> str:
    """The whole file. `facts`: a few (figure, what it counts) for the top."""
    anchors = [(table.title, _anchor(table.title)) for table in tables]
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>interflow-kernels: speed</title><style>{CSS}</style></head><body>",
        f'<h1>interflow-kernels: what it costs, and beside what</h1><p class="soft">{escape(machine_line(results))}</p>',
        '<div class="facts">' + "".join(f'<div class="fact"><b>{escape(figure)}</b>{escape(what)}</div>' for figure, what in facts) + "</div>",
        '<nav><a href="#charts">Charts</a>' + "".join(f'<a href="#{anchor}">{escape(title)}</a>' for title, anchor in anchors) + "</nav>",
        "<p>Every provider got the same inputs and was checked before it was timed; all providers of a case took turns, round by round, so that a drifting "
        "machine meets all of them alike. Ratios are paired within a round.</p>",
        '<h2 id="charts">Charts</h2><div class="charts">',
        *(_figure(chart) for chart in charts),
        "</div>",
        *(_table(table, anchor) for table, (_, anchor) in zip(tables, anchors, strict=True)),
        f"<script>{SCRIPT}</script></body></html>\n",
    ]
    return "\n".join(parts)


def _figure(chart: Chart) -> str:
    return f"<figure><h3>{escape(chart.title)}</h3>{chart.svg()}<figcaption>{escape(chart.caption)}</figcaption></figure>"


def _table(table: Table, anchor: str) -> str:
    head = "".join(f'<th scope="col"><button type="button">{escape(title)}</button></th>' for title in table.header)
    rows = []
    for row in table.rows:
        lost = any(shown in ("**no**", "slower") for shown, _ in row)
        cells = "".join(f'<td data-key="{escape(_key(key))}">{_bold(shown)}</td>' for shown, key in row)
        rows.append(f"<tr{' class=lost' if lost else ''}>{cells}</tr>")
    search = f'<input type="search" data-table="t-{anchor}" placeholder="filter, e.g. fp32 nchw" aria-label="filter">' if len(table.rows) > 12 else ""
    note = f'<p class="soft">{escape(table.note)} A click on a heading sorts.</p>'
    body = f'<div class="scroll"><table id="t-{anchor}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f'<h2 id="{anchor}">{escape(table.title)}</h2>{note}{search}{body}'


def _key(key: float | str) -> str:
    return str(int(key)) if isinstance(key, bool) else str(key)


def _bold(text: str) -> str:
    return f"<b>{escape(text[2:-2])}</b>" if text.startswith("**") else escape(text)


def _anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())
