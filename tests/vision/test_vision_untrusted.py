"""Nothing that a file of a stranger holds is executed: checkpoints, configurations and studies that try to."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from interflow_vision import cli
from interflow_vision.cli.report import data_of
from interflow_vision.compare import plan
from interflow_vision.errors import UserError
from interflow_vision.training import checkpoints, finetuning, resume_options
from interflow_vision.training.checkpoint_io import SafeCheckpointIO


@pytest.fixture
def trace(tmp_path):
    """A folder that appears where an attack was executed."""
    folder = tmp_path / "executed"
    yield folder
    assert not folder.exists()


class Attack:
    """An object whose unpickling makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


READERS = {
    "checkpoints.read": checkpoints.read,
    "checkpoints.load": checkpoints.load,
    "finetuning.take_trunk": lambda path: finetuning.take_trunk(torch.nn.Linear(1, 1), path),
    "report.data_of": lambda path: data_of(path, None),
    "SafeCheckpointIO, as Lightning calls it": SafeCheckpointIO().load_checkpoint,
}


def test_the_attack_works_where_pickles_are_trusted(tmp_path):
    torch.save({"state_dict": Attack(tmp_path / "executed")}, tmp_path / "evil.ckpt")
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert (tmp_path / "executed").is_dir()


@pytest.mark.parametrize("reader", READERS)
def test_a_checkpoint_with_code(tmp_path, trace, reader, monkeypatch):
    torch.save({"state_dict": {}, "hyper_parameters": {}, "evil": Attack(trace)}, tmp_path / "evil.ckpt")
    with pytest.raises(Exception, match=r"damaged|[Ww]eights.only|evil\.ckpt"):
        READERS[reader](tmp_path / "evil.ckpt")


def test_a_checkpoint_at_a_url_holds_no_code_either(monkeypatch):
    """Lightning 2.6 reads it with weights_only=False unless it is told."""
    given = []
    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io.get_filesystem", lambda _: SimpleNamespace(exists=lambda _: True))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **options: given.append(options) or {})
    SafeCheckpointIO().load_checkpoint("https://example.invalid/last.ckpt")
    SafeCheckpointIO().load_checkpoint("https://example.invalid/last.ckpt", weights_only=None)
    assert [each["weights_only"] for each in given] == [True, True]


CALLS = {"os.mkdir": {"path": ""}, "subprocess.Popen": {"args": ["mkdir", ""]}, "pathlib.Path.mkdir": {"self": ""}, "torch.load": {"f": ""}}


@pytest.mark.parametrize("called", CALLS)
def test_a_checkpoint_does_not_choose_what_is_called(checkpoint, tmp_path, trace, called):
    content = torch.load(checkpoint, weights_only=True)
    options = {key: [word or str(trace) for word in each] if isinstance(each, list) else str(trace) for key, each in CALLS[called].items()}
    content["datamodule_hyper_parameters"] = {"_class_path": called, **options}
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=rf"^the data set {called} of .* cannot be made again: "):
        data_of(tmp_path / "evil.ckpt", None)


def test_a_run_goes_on_only_with_a_data_module(checkpoint, tmp_path, trace, lightning_cli, monkeypatch, capsys):
    content = torch.load(checkpoint, weights_only=True)
    content["datamodule_hyper_parameters"] = {"_class_path": "subprocess.Popen", "args": ["mkdir", str(trace)]}
    torch.save(content, tmp_path / "evil.ckpt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["interflow", "test", "--ckpt_path", str(tmp_path / "evil.ckpt")])
    assert cli.main() != 0
    assert "subprocess.Popen" in capsys.readouterr().err


TAGS = {
    "a call": "!!python/object/apply:os.mkdir ['{}']",
    "an object": "!!python/object/new:os.mkdir ['{}']",
    "a module": "!!python/module:antigravity",
}


@pytest.mark.parametrize("kind", TAGS)
def test_tags_of_yaml(tmp_path, trace, kind, lightning_cli, monkeypatch, capsys):
    text = f"title: {TAGS[kind].format(trace)}\n"
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"is no YAML: could not determine a constructor"):
        plan.read(tmp_path / "config.yaml")
    with pytest.raises(Exception, match="could not determine a constructor"):
        resume_options.kept({"hyper_parameters": {}}, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["interflow", "fit", "--config", str(tmp_path / "config.yaml")])
    assert cli.main() != 0
    assert len(capsys.readouterr().err.splitlines()) == 1
