"""The parser of `interflow fit`, `validate` and `test`: a wrong option is one sentence, and --help fits on two screens."""

import argparse
import difflib
import re
import shutil
import textwrap
from types import SimpleNamespace
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from .. import data as data_sets
from ..data.modules import Digits, ImageFolder
from ..errors import UserError

OFTEN = {
    "ckpt_path": "a checkpoint: best or last, of the newest run below trainer.default_root_dir, or a file; fit goes on from it",
    "trainer.default_root_dir": "folder of the runs, each in a folder version_N of its own",
    "trainer.max_epochs": "epochs to train",
    "trainer.accelerator": "cpu, cuda, mps, ...",
    "trainer.devices": "how many, or which: 2, [0, 3]",
    "trainer.strategy": "how several devices work together: ddp, fsdp, ...",
    "trainer.num_nodes": "machines",
    "trainer.precision": "32-true, bf16-mixed, 16-mixed, ...",
    "trainer.accumulate_grad_batches": "batches between two steps of the optimiser",
    "trainer.gradient_clip_val": "largest norm of the gradient",
    "trainer.limit_train_batches": "part (0.1) or number (10) of the batches in an epoch, to try things out",
    "trainer.fast_dev_run": "true: one batch of everything, to find mistakes; nothing is kept",
    "trainer.enable_progress_bar": "false: neither a bar nor, away from terminals, a line an epoch",
    "trainer.callbacks": "further callbacks, e.g. --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/loss",
    "checkpoint.monitor": "metric that picks best.ckpt",
    "checkpoint.mode": "min or max of it",
}
"""Options of Lightning that the short help lists, in our words: Lightning's own take three times the lines."""

DATA_SETS: tuple[type, ...] = tuple(getattr(data_sets, name) for name in data_sets.__all__)
OTHER_DATA = ", ".join(name for name in data_sets.__all__ if name not in ("Digits", "ImageFolder"))

AUGMENTATION = ("randaugment", "magnitude", "erasing", "mixup", "cutmix")
"""Options of images that the short help leaves to `--data.help NAME`."""


class WideHelp(DefaultHelpFormatter):  # type: ignore[misc, unused-ignore]
    """argparse's help in lines of at least 110 columns: options with long descriptions take half the lines."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "width": max(110, shutil.get_terminal_size().columns - 2)})


class Parser(LightningArgumentParser):  # type: ignore[misc, unused-ignore]
    """Lightning's parser with errors as UserError and a short help in front of the whole one."""

    shows_all = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": WideHelp, **options})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """UserError, with the names that come nearest to an unknown option; inside of Lightning's own parsing as ever."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        raise UserError(f"{plain(message)}{_suggestion(parser, message)}; see `{_command(parser)} --help`") from ex

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """The options of model and data and those of Lightning that one needs often; after --help-all everything."""
        if self.shows_all or str(self.description).startswith("Help for --"):  # --help-all, --data.help NAME
            return super().format_help() if formatter is None else super().format_help(formatter)
        head = f"usage: {_command(self)} [options]\n\n{self.description}\n\nFrom files: --config FILE, in YAML; --print_config prints one with all values.\n"
        model = [action for action in self._actions if action.dest.startswith("model.")]
        general = [action for action in self._actions if isinstance(action, argparse._HelpAction) or action.dest in ("config", "seed_everything")]
        data = "data (--data NAME, or --data with the class path of your own LightningDataModule)"
        return "\n".join(
            [
                head,
                self._rendered("model", model),
                f"{data}:\n\n  Digits, unless --data says otherwise: scikit-learn's handwritten digits\n{_options_of(Digits)}",
                f"  ImageFolder: root/train/<class>/*.jpg and root/val/<class>/*.jpg; all: `--data.help ImageFolder`\n{_options_of(ImageFolder, AUGMENTATION)}",
                f"  {OTHER_DATA}: `{_command(self)} --data.help NAME`\n",
                self._often(),
                self._rendered("general", general),
            ]
        )

    def _often(self) -> str:
        """The section of Lightning's options."""
        lines = ["training and checkpoints, those of Lightning's options that are needed most often:"]
        defaults = self.get_defaults()
        for name, does in OFTEN.items():
            default = defaults.get(name)
            text = does + ("" if default is None else f" (default: {default})")
            lines += textwrap.wrap(text, 100, initial_indent=f"  --{name:<34}", subsequent_indent=" " * 38)
        return "\n".join(lines) + "\n"

    def _rendered(self, title: str, actions: list[argparse.Action]) -> str:
        """A section of argparse's help with these options alone, their defaults as configured."""
        kept = self._action_groups, self.usage, self.description
        self._action_groups = [SimpleNamespace(title=title, description=None, _group_actions=actions)]  # type: ignore[list-item]
        self.usage, self.description = argparse.SUPPRESS, None
        try:
            return super().format_help()
        finally:
            self._action_groups, self.usage, self.description = kept


class HelpAll(argparse._HelpAction):
    """--help-all: every option there is."""

    def __call__(self, parser: Any, *_: Any) -> None:
        """Prints and ends."""
        parser.shows_all = True
        parser.print_help()
        parser.exit()


def plain(message: str) -> str:
    """jsonargparse's message in one line and a user's words: "--model.lr: expected float, got abc"."""
    text = " ".join(message.split()).rstrip(".")
    text = re.sub(r"<class '([^']+)'>", r"\1", text)
    option, text = re.fullmatch(r'(?:Parser key "(.+?)": ?)?(.*)', text).groups()  # type: ignore[union-attr]
    if problem := re.search(r"Problem with given class_path '(?:\w+\.)*(\w+)': (.+?)(?: - Expected a NoneType.*)?$", text):  # of a data set or callback
        if inner := re.match(r'Parser key "(.+?)": ?', problem[2]):
            option, text = f"{option}.{inner[1]}", problem[2][inner.end() :]
        else:
            text = f"{problem[1]} does not take this: {problem[2].strip()}"
    if union := re.search(r"Subtypes: \[(.+?)\] Errors: - (.+?) (?:- Expected a .*)?Given value type.*?Given value: (.*)$", text):
        names = re.sub(r"\b(?:\w+\.)+(?=\w)", "", union[1]).replace("NoneType", "null")
        text = f"expected one of {names}, got {union[3]}" if union[2].startswith("Expected a ") else union[2]
    text = re.sub(r"Expected a typing\.Literal\[(.+)\]\. Got value: ", r"expected one of \1, got ", text)
    text = re.sub(r"Expected a (.+?)\. Got value: ", r"expected \1, got ", text)
    return f"--{option}: {text}" if option else text


def _command(parser: Any) -> str:
    return str(parser.prog).replace(" [options]", "")


def _options_of(class_: type, without: tuple[str, ...] = ()) -> str:
    """The help of a data module's options, but for some."""
    parser = Parser(add_help=False, usage=argparse.SUPPRESS, description="")
    parser.shows_all = True
    parser.add_class_arguments(class_, "data", skip=set(without))
    text = parser.format_help()
    return "\n".join(line for line in text.splitlines() if line.startswith("  ") and not line.startswith("  --data CONFIG")) + "\n"


def _suggestion(parser: Any, message: str) -> str:
    """What the unknown option in an error's message may have meant."""
    refused = re.search(r"Option '(\w+)' is not accepted", message)
    unknown = f"--data.{refused[1]}" if refused else next(iter(re.findall(r"nrecognized arguments: (--[\w.\-]+)", message)), None)
    if unknown is None:
        return ""
    names = [name for action in parser._actions for name in action.option_strings]
    names += [f"--data.{name}" for class_ in DATA_SETS for name in _parameters(class_)]
    near = difflib.get_close_matches(unknown, names, n=1, cutoff=0.7)
    return f" (did you mean {near[0]}?)" if near else ""


def _parameters(class_: type) -> list[str]:
    code = class_.__init__.__code__  # type: ignore[misc]
    return list(code.co_varnames[1 : code.co_argcount])
