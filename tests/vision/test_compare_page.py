"""Pages are made of committed results alone, and documents claim nothing that no page has a figure for."""

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("markdown")

from interflow_vision.cli import compare
from interflow_vision.compare import page, plan, plots, results, tables
from interflow_vision.errors import UserError

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FIXTURE = HERE / "study"
COMMITTED = [FIXTURE, *(path.parent for path in sorted(ROOT.glob("bench/studies/*/report.md")))]
RESULTS = sorted(ROOT.glob("bench/studies/*/results"))


# --- the page -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_the_page_regenerates_from_committed_results(folder, tmp_path):
    study = plan.read(folder / "study.yaml")
    results.missing([*study.tuning(), *study.finals(results.chosen_rates(study, folder / "results"))], folder / "results")  # all of the study's options
    pictures = plots.draw(study, results.finals(study, folder / "results"), tmp_path)
    command = f"interflow compare {(folder / 'study.yaml').relative_to(ROOT)}"
    text = page.markdown(study, folder / "results", command, pictures)
    assert text == (folder / "report.md").read_text(), f"run `{command} --page`"
    assert page.html(text, folder) == (folder / "report.html").read_text(), f"run `{command} --page`"
    assert set(re.findall(r"\]\((\S+\.png)\)", text)) == set(pictures) == {path.name for path in folder.glob("*.png")}


def test_results_that_are_committed_have_their_page():
    assert all((folder.parent / "report.md").is_file() for folder in RESULTS)


def test_every_figure_of_the_table_follows_from_the_results():
    study = plan.read(FIXTURE / "study.yaml")
    found = results.finals(study, FIXTURE / "results")
    cell, base = plan.Cell("digits", "vgg16_bn", "nxn-norm-loss"), plan.Cell("digits", "vgg16_bn", "plain")
    values = [[100 * found[each][seed]["test"]["accuracy"] for seed in (0, 1)] for each in (cell, base)]
    row = next(line for line in tables.accuracy(study, found, "digits", "vgg16_bn").splitlines() if line.startswith("| nxn, norm"))
    differences = [a - b for a, b in zip(*values, strict=True)]
    mean, half = sum(differences) / 2, abs(differences[0] - differences[1]) / 2
    assert f"| {sum(values[0]) / 2:.2f} ± {abs(values[0][0] - values[0][1]) / 2**0.5:.2f} |" in row
    assert f"| {mean:+.2f} | [{mean - 12.706204736 * half:+.2f}, {mean + 12.706204736 * half:+.2f}] |" in row  # Student's t, 1 degree of freedom
    assert f"| {found[cell][0]['parameters']:,} |" in row


def test_a_page_needs_results(tmp_path):
    shutil.copy(FIXTURE / "study.yaml", tmp_path)
    with pytest.raises(UserError, match="there are no results in .* yet: train the study first, `interflow compare "):
        compare.main([str(tmp_path / "study.yaml"), "--page"])


def test_the_command_makes_the_page_anew(tmp_path, capsys):
    shutil.copytree(FIXTURE / "results", tmp_path / "results")
    shutil.copy(FIXTURE / "study.yaml", tmp_path)
    assert compare.main([str(tmp_path / "study.yaml"), "--page"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "report.md"), str(tmp_path / "report.html")]
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == len(list(tmp_path.glob("*.png")))


def test_a_run_that_diverged_and_arms_without_results_are_shown(tmp_path):
    shutil.copytree(FIXTURE / "results", tmp_path / "results")
    study = plan.read(FIXTURE / "study.yaml")
    folder = tmp_path / "results/final/digits/vgg16_bn"
    shutil.rmtree(folder / "plain")
    for path in (folder / "nxn").glob("*.json"):
        kept = {k: v for k, v in results.read(path).items() if k not in ("test", "training", "validation", "contribution")}
        results.write(path, {**kept, "status": "diverged", "why": "the training loss is nan"})
    text = page.markdown(study, tmp_path / "results", "x", {})
    assert re.search(r"^\| nxn \| [\d,]+ \| [\d.]+ \| 0 \| diverged \|", text, re.MULTILINE)
    assert text.count("**not decided**") == 2


def test_the_readmes_part():
    study = plan.read(FIXTURE / "study.yaml")
    part = page.section(study, FIXTURE / "results", ("digits", "vgg16_bn"), "docs/x.md")
    readme = f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n"
    made = page.rewritten(readme, part)
    assert made.startswith("before\n") and made.endswith("\nafter\n") and "old" not in made and "| plain | 2 |" in made
    assert page.rewritten(made, part) == made
    with pytest.raises(UserError, match="must have <!-- study:begin -->"):
        page.rewritten("nothing", part)


# --- what documents claim ---------------------------------------------------------------------------------------------------
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
WORDS = re.compile(
    r"more accurate|less accurate|more accuracy|better accuracy|degrad|over-?fit|vanish|discriminative|does not hold|not decided|\bclaim holds"
    r"|generalis|learns? (?:faster|slower|more|better)|Interflow (?:helps|does not help)",
    re.IGNORECASE,
)
FIGURE = re.compile(r"[-+]?\d+\.\d+")
"""As a page writes figures: with a point."""


def unfounded(text, pages):
    """The sentences, items and rows of a document that claim what training shows without a figure that a page has."""
    known = {figure.lstrip("+-") for each in pages for figure in FIGURE.findall(each)}
    found = []
    for paragraph in re.split(r"\n\s*\n|\n(?=[-|#*] ?)", text):
        for sentence in re.split(r"(?<=[.;])\s+", " ".join(paragraph.split())) if not paragraph.startswith("|") else [paragraph]:
            figures = {figure.lstrip("+-") for figure in FIGURE.findall(sentence)}
            if WORDS.search(sentence) and not sentence.startswith("#") and not (figures and figures <= known):
                found.append(sentence)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_claim_nothing_without_a_figure(document):
    pages = [(folder / "report.md").read_text() for folder in COMMITTED if folder != FIXTURE]
    assert not unfounded(document.read_text(), pages)


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        ("Interflow is more accurate.", 1),
        ("Interflow is more accurate, by 1.25 points.", 0),
        ("Interflow is more accurate, by 1.26 points.", 1),  # which no page has
        ("It was measured: 1.25. Very deep networks do not degrade.", 1),
        ("- Middle layers become discriminative: -1.25 points\n- Gradients do not vanish", 1),
        ("| networks degrade | **holds** | 1.25 |\n| they over-fit less | **not decided** | |", 1),
        ("## When Interflow helps, and when it is more accurate\n\nThe table has 3 rows.", 0),
        ("A head pools maps.", 0),
    ],
)
def test_claims_are_found(text, claims):
    assert len(unfounded(text, ["less plain: +1.25 [+0.50, +2.00]"])) == claims


def test_the_readmes_table_is_the_pages():
    readme = (ROOT / "README.md").read_text()
    if page.BEGIN not in readme:
        assert not RESULTS, "results are committed, so README.md must have their table: compare.page.section"
        return
    where = re.search(r"All of it: `(bench/studies/[\w-]+)/report.md`", readme)
    title = re.search(rf"{page.BEGIN}\n(.+?) on (.+?); test accuracy", readme)
    study = plan.read(ROOT / where[1] / "study.yaml")
    (network,) = [name for name, options in study.networks.items() if options["title"] == title[1]]
    (data,) = [name for name, options in study.data.items() if options["title"] == title[2]]
    part = page.section(study, ROOT / where[1] / "results", (data, network), f"{where[1]}/report.md")
    assert page.rewritten(readme, part) == readme, "put compare.page.section's text between the marks again"
