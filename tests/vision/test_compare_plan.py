"""A study's YAML file: what is asked for, and one sentence for what does not fit."""

from pathlib import Path

import pytest
import yaml

from interflow_vision.compare import plan
from interflow_vision.compare.plan import Cell
from interflow_vision.errors import UserError

ROOT = Path(__file__).parent.parent.parent
SMALL = yaml.safe_load((Path(__file__).parent / "study/study.yaml").read_text())
STUDIES = sorted(ROOT.glob("bench/studies/*/study.yaml"))


def read(tmp_path, **changes):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in {**SMALL, **changes}.items() if value is not None}, sort_keys=False))
    return plan.read(path)


def test_runs(tmp_path):
    study = read(tmp_path)
    tuning = list(study.tuning())
    assert len(tuning) == 4 * 2 and not any(run.final for run in tuning) and {run.seed for run in tuning} == {1000}
    assert str(tuning[0].path) == "tuning/digits/vgg16_bn/plain/rate0.02-seed1000.json"
    finals = list(study.finals(dict.fromkeys(study.seeds, 0.1)))
    assert len(finals) == 3 * 2 + 1 and all(run.final and run.rate == 0.1 for run in finals)
    assert len({run.path for run in (*tuning, *finals)}) == 15
    assert [run.seed for run in finals] == [0, 0, 0, 0, 1, 1, 1]  # the first seed of every cell first
    assert finals[-1].options == {
        "data": {"source": "digits", "size": 16, "epochs": 3},
        "model": {"name": "vgg16_bn", "width": 0.0625, "head": "fused", "attention": "nxn", "norm": "batch", "branch_loss": 0.3},
        "recipe": {"batch_size": 64, "momentum": 0.9, "weight_decay": 5e-4, "label_smoothing": 0.0, "warmup": 0.25},
    }
    assert not list(read(tmp_path, rates=[0.1]).tuning())


def test_a_later_block_changes_a_cells_seeds(tmp_path):
    cells = [*SMALL["cells"], {"data": ["digits"], "networks": ["vgg16_bn"], "arms": ["nxn"], "seeds": [0, 1, 2, 3]}]
    study = read(tmp_path, cells=cells)
    assert study.seeds[Cell("digits", "vgg16_bn", "nxn")] == (0, 1, 2, 3) and len(study.seeds) == 4


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.parent.name)
def test_committed_studies_can_be_run(path):
    """Every cell's model is one that can be built, every claim's measure exists; at least five seeds."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("lightning")
    from interflow_vision.compare import claims
    from interflow_vision.models.registry import create_model

    study = plan.read(path)
    assert study.seeds and all(len(seeds) >= 5 for seeds in study.seeds.values())
    assert {claim.measure for claim in study.claims} <= set(claims.MEASURES)
    for cell in study.seeds:
        options = {key: value for key, value in study.run(cell, 0, 0.1, True).options["model"].items() if key != "start"}
        with torch.device("meta"):
            create_model(**options)


def test_there_is_a_committed_study():
    assert STUDIES


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"colour": 1}, "it has 'colour'; it may have about, arms"),
        ({"arms": None}, "'arms' is missing"),
        ({"rates": []}, r"rates must be a list that is not empty, got \[\]"),
        ({"rates": [0]}, "rates must be numbers above 0, got 0"),
        ({"rates": ["x"]}, "rates must be numbers above 0, got 'x'"),
        ({"seeds": [0, 0]}, r"seeds must be different whole numbers of at least 0, got \[0, 0\]"),
        ({"seeds": 3}, "seeds must be a list that is not empty, got 3"),
        ({"tuning_seeds": [1]}, "tuning_seeds must be none of the seeds that count, got 1 in both"),
        ({"threads": 0}, "threads must be a whole number of at least 1, got 0"),
        ({"recipe": {"batch": 3}}, "recipe has 'batch'; it may have batch_size"),
        ({"baseline": "middle"}, "baseline must be one of the arms, plain, nxn, nxn-norm-loss, got 'middle'"),
        ({"data": {"digits": {"source": "digits"}}}, "data 'digits' must have a source and epochs"),
        ({"data": {"../x": {"source": "digits", "epochs": 1}}}, "data must have names of letters, digits and"),
        ({"arms": {"plain": 3}}, "arms 'plain' must be a mapping, got int"),
        ({"networks": {}}, "networks must not be empty"),
        ({"cells": []}, "cells must be a list that is not empty"),
        ({"cells": [{"data": ["digits"], "networks": ["vgg16_bn"]}]}, "each of cells must have data, networks, arms"),
        ({"cells": [{"data": ["digits"], "networks": ["vgg16_bn"], "arms": ["soft"]}]}, "cells name 'soft', which is none of arms: plain, nxn"),
        ({"claims": [{"says": "x"}]}, "each of claims must have says, measure, of, than and expect, got says"),
        ({"claims": [{**SMALL["claims"][0], "expect": "equal"}]}, "expect must be greater or less, got 'equal'"),
        (
            {"claims": [{**SMALL["claims"][0], "than": {"arm": "hard"}}]},
            "the claim 'With a norm .*' speaks of .*'arm': 'hard'.*, which is no cell of the study",
        ),
    ],
)
def test_what_does_not_fit(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=f"^the study .*study.yaml does not fit: {sentence}"):
        read(tmp_path, **changes)


def test_no_file_and_no_yaml(tmp_path):
    with pytest.raises(UserError, match=r"^the study .*none.yaml cannot be read \(No such file or directory\)"):
        plan.read(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"^the study .*bad.yaml is no YAML: "):
        plan.read(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match=r"the file must be a mapping, got list"):
        plan.read(tmp_path / "list.yaml")
