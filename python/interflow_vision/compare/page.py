"""The page of a study, made from its results alone: Markdown, the same as HTML, and the pictures."""

import base64
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path

from ..errors import UserError
from . import plots, results, statistics, tables
from .plan import Cell, Study

STYLE = """
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: #1c1f23; background: #fff; font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
p { max-width: 52rem; } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #e1e4e8; vertical-align: top; }
th { background: #f5f6f8; }
"""


def write(study: Study, folder: Path, out: Path, command: str) -> list[Path]:
    """report.md, report.html and the pictures into `out`, from the results in `folder`; the files. UserError where there is no result yet.

    command: how the study is trained, for the page to say.
    """
    found = results.finals(study, folder)
    if not found:
        raise UserError(f"there are no results in {folder} yet: train the study first, `{command}`")
    out.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw(study, found, out)
    text = markdown(study, folder, command, pictures)
    (out / "report.md").write_text(text)
    (out / "report.html").write_text(html(text, out))
    return [out / "report.md", out / "report.html", *(out / name for name in pictures)]


def markdown(study: Study, folder: Path, command: str, pictures: Mapping[str, str]) -> str:
    """The page; `pictures`: what `plots.draw` gave."""
    found = results.finals(study, folder)
    parts = [f"# {study.title}\n", f"{study.about}\n" if study.about else "", _made(study, folder, found, command)]
    if study.claims:
        parts += ["## Claims\n", _how_decided(study), tables.verdicts(study, found)]
    for data, network in tables.places(found):
        parts.append(f"## {study.networks[network]['title']}, {study.data[data]['title']}\n")
        parts += [tables.accuracy(study, found, data, network), _pictures(pictures, f"{data}-{network}-", ("differences", "curves"))]
        alone = tables.branches(study, found, data, network)
        if alone:
            parts += ["### Branches\n", alone, _pictures(pictures, f"{data}-{network}-", ("branches",))]
        parts += ["### Gradients\n", tables.gradients(study, found, data, network), _pictures(pictures, f"{data}-{network}-", ("gradients",))]
        parts += ["### Training and test images\n", tables.fit(study, found, data, network)]
    for data in dict.fromkeys(cell.data for cell in found):
        deep = tables.depth(study, found, data)
        if deep:
            parts += [f"## Accuracy against depth, {study.data[data]['title']}\n", deep, _pictures(pictures, f"{data}-", ("depth",))]
    if len(study.rates) > 1:
        parts += ["## Learning rates\n", _how_chosen(study), tables.rates(study, results.tuning_accuracies(study, folder))]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).strip() + "\n"


def _made(study: Study, folder: Path, found: tables.Found, command: str) -> str:
    runs = [run for cell in found.values() for run in cell.values()]
    tuned = [results.read(folder / run.path) for run in study.tuning() if (folder / run.path).is_file()]
    hours = sum(run["seconds"] for run in (*runs, *tuned)) / 3600
    where = sorted({f"{run['machine']['device']}, {_threads(run['machine']['threads'])}, torch {run['versions']['torch']}" for run in runs})
    planned = sum(map(len, study.seeds.values()))
    text = f"{len(runs)} of {planned} runs that count, {len(tuned)} for the learning rates; {hours:.2f} hours of processes, trained on: {'; '.join(where)}."
    recipe = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in study.recipe.items())
    how = f"SGD with Nesterov momentum and one cycle of the learning rate, {recipe}; the weights after the last epoch count."
    note = (
        "Times are of the training steps alone, with as many other runs beside them as there was room for: they are no benchmark. "
        "Means ± standard deviations over seeds; intervals are 95 %, of the mean of paired differences, by Student's t and by the bootstrap "
        f"({statistics.RESAMPLES} resamples, percentiles). They are not corrected for the number of comparisons."
    )
    return f"{text} {how}\n\n    {command}\n\n{note}\n"


def _threads(count: int) -> str:
    return f"{count} thread" + "s" * (count != 1)


def _how_decided(study: Study) -> str:
    return (
        "A claim holds where the whole interval of its difference is on the side that it says, does not hold where it is on the other, and is not "
        f"decided where the interval has 0 in it. {len(study.claims)} claims are looked at.\n"
    )


def _how_chosen(study: Study) -> str:
    grid, seeds = ", ".join(f"{rate:g}" for rate in study.rates), ", ".join(map(str, study.tuning_seeds))
    return f"Of {grid}, for each cell by validation accuracy in %, seeds {seeds}; in bold what was chosen. The test images were not looked at.\n"


def _pictures(pictures: Mapping[str, str], prefix: str, kinds: tuple[str, ...]) -> str:
    named = {f"{prefix}{kind}.png": kind for kind in kinds}
    return "".join(f"![{kind}]({name})\n\n{pictures[name]}\n\n" for name, kind in named.items() if name in pictures)


def html(text: str, folder: Path) -> str:
    """The Markdown as one HTML file that needs nothing else; pictures are read from the folder."""
    import markdown as library

    body = library.markdown(text, extensions=["tables"])

    def inline(match: "re.Match[str]") -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / match[1]).read_bytes()).decode()}"'

    body = re.sub(r'src="([^":]+\.png)"', inline, body)
    title = escape(text.partition("\n")[0].removeprefix("# "))
    return f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{STYLE}</style>\n{body}\n</html>\n'


BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"


def section(study: Study, folder: Path, cells: tuple[str, str], page: str) -> str:
    """A README's part: the table of one data set and network, and the claims. `page`: where the whole page lies."""
    found = results.finals(study, folder)
    data, network = cells
    runs = [run for cell, each in found.items() if (cell.data, cell.network) == cells for run in each.values()]
    if not runs:
        raise UserError(f"there are no results of {network} on {data} in {folder}")
    base, rows = results.accuracies(found.get(Cell(data, network, study.baseline), {})), []
    for cell in tables.arms_of(found, data, network):
        own = results.accuracies(found[cell])
        if own:
            s, d = statistics.summary(list(own.values())), statistics.paired(own, base) if cell.arm != study.baseline else None
            less = "" if d is None else f"{100 * d.mean:+.2f} {tables.interval(None if d.t is None else (100 * d.t[0], 100 * d.t[1]))}"
            rows.append([study.arms[cell.arm]["title"], str(s.n), tables.spread(list(own.values())), less])
    title = study.arms[study.baseline]["title"]
    head = f"{study.networks[network]['title']} on {study.data[data]['title']}; test accuracy in %, and its difference from {title} in points,"
    text = f"{head}\npaired by seed, with its 95 % interval. All of it: `{page}`.\n"
    parts = [BEGIN, text, tables.table(["arm", "seeds", "test accuracy", f"less {title}"], rows)]
    if study.claims:
        parts.append(tables.verdicts(study, found))
    return "\n".join([*parts, END])


def rewritten(readme: str, part: str) -> str:
    """The README with `part` in place of what stands between the marks; UserError where they are missing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise UserError(f"the README must have {BEGIN} and, behind it, {END}, once each")
    return readme[: readme.index(BEGIN)] + part + readme[readme.index(END) + len(END) :]
