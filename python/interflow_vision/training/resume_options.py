"""What `--ckpt_path` means for the other options: the checkpoint's model and data, and its run's options beneath the command line."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ..errors import UserError

Options = dict[str, Any]

TRAINING_OPTIONS = (
    "lr",
    "momentum",
    "weight_decay",
    "label_smoothing",
    "warmup",
    "auxiliary_weight",
    "branch_loss",
    "skip_nonfinite",
    "step_at",
    "channels_last",
    "compile",
    "checkpointing",
)
"""Of the model: how it is trained, not what it is. A run that goes on may change them."""

READING_OPTIONS = ("root", "num_workers")
"""Of the data: where and how they are read. Whatever reads the checkpoint's data may change them."""


def kept(content: Mapping[str, Any], run: Path | None) -> Options:
    """The options "model" and, where they are known, "data" of a checkpoint: from itself, else from its run's config.yaml."""
    found: Options = {"model": _public(content["hyper_parameters"])}
    data = content.get("datamodule_hyper_parameters") or {}
    if "_class_path" in data:
        found["data"] = {"class_path": data["_class_path"], "init_args": _public(data)}
    elif run is not None and (run / "config.yaml").is_file():
        config = yaml.safe_load((run / "config.yaml").read_text()) or {}
        if isinstance(config.get("data"), dict):
            found["data"] = config["data"]
    return found


def _public(options: Mapping[str, Any]) -> Options:
    # keys with an underscore are LightningCLI's own notes
    return {key: value for key, value in options.items() if not key.startswith("_")}


@contextmanager
def beneath(parser: Any, config: Path | None, options: Options) -> Iterator[None]:
    """While it lasts, a run's config.yaml and then `options` are the parser's defaults, above its own."""
    own = list(parser.default_config_files)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(options, file)  # JSON is YAML
        file.flush()
        try:
            parser.default_config_files = [*own, *([] if config is None else [str(config)]), file.name]
            yield
        finally:
            parser.default_config_files = own


def changes(command: str, options: Options, given: Options) -> list[str]:
    """A line for each option by which `given` differs from the checkpoint's and which is followed; UserError for any other.

    options: what `kept` gave; given: the options as they were parsed with `options` as defaults, so that each difference was
    asked for on the command line or in a file of --config.
    """
    free: tuple[str, ...] = TRAINING_OPTIONS if command == "fit" else ()
    lines = _differences("--model.", options["model"], given["model"], free, "the checkpoint's model has")
    if "data" not in options:
        return lines
    old, new = options["data"], given["data"]
    if old["class_path"] != new["class_path"]:
        if command == "fit":
            raise UserError(_refusal("--data", new["class_path"], "the run's data set is", old["class_path"]))
        return lines
    free = READING_OPTIONS if command == "fit" else (*READING_OPTIONS, "batch_size")
    return lines + _differences("--data.", old.get("init_args") or {}, new.get("init_args") or {}, free, "the run has")


def _differences(prefix: str, old: Options, new: Options, free: tuple[str, ...], owner: str) -> list[str]:
    lines = []
    for key in old:
        if key in new and _plain(old[key]) != _plain(new[key]):
            if key not in free:
                raise UserError(_refusal(prefix + key, new[key], owner, old[key]))
            lines.append(f"{prefix}{key} is {new[key]} from here on, it was {old[key]}")
    return lines


def _refusal(option: str, new: Any, owner: str, old: Any) -> str:
    return f"{option} {new} cannot be combined with --ckpt_path: {owner} {old}; leave {option} away, or train anew without --ckpt_path"


def _plain(value: Any) -> Any:
    """Tuples as lists, as they come back from a file."""
    return json.loads(json.dumps(value, default=str))
