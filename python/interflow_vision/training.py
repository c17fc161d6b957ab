"""LightningCLI with this package's model, data and run folders: what `interflow fit`, `validate` and `test` are."""

from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from . import checkpoints, checks, digits, progress, runs
from .errors import UserError, one_line
from .lit import Classifier
from .options import HelpAll, Parser, plain
from .quiet import quiet

DESCRIPTIONS = {
    "fit": "Trains a model, tests its best checkpoint and draws the curves. Without options: VGG-16-BN with Interflow on handwritten digits.",
    "validate": "Evaluates the checkpoint that --ckpt_path names on the validation images.",
    "test": "Evaluates the checkpoint that --ckpt_path names on the test images.",
}


class InterflowCLI(LightningCLI):
    """`fit`, `validate`, `test` with Lightning's own options; after `fit` the best checkpoint is tested and the log drawn.

    Every run has a folder `version_N` below `trainer.default_root_dir`, with config.yaml, metrics.csv, TensorBoard's
    events, checkpoints/{best,last}.ckpt and curves.png. `--ckpt_path last` (or `best`) means the newest run's; with
    `fit`, `last` goes on in that run's folder.
    """

    _resumed: Path | None = None  # the run folder that goes on

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without its `predict`."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The ModelCheckpoint that keeps best.ckpt and last.ckpt, as options --checkpoint.*; the whole help."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_argument("--help-all", action=HelpAll, help="show every option, Lightning's too, and exit")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses, then looks at the checkpoint and the run folder before anything is built."""
        super().parse_arguments(parser, args)
        command = self.config.subcommand
        given = self.config[command]
        root = given.trainer.default_root_dir or "."
        if given.ckpt_path is not None:
            path = runs.checkpoint(str(given.ckpt_path), Path(root))
            content = checkpoints.read(path)
            if command == "fit":
                checks.require_epochs_left(path, content, given.trainer.max_epochs)
            if command == "fit" and given.ckpt_path == "last":
                self._resumed = path.parents[1]
            given.ckpt_path = str(path)
        elif command != "fit":
            raise UserError(f"`interflow {command}` needs --ckpt_path: best, last (of the newest run below {root}) or a checkpoint file")
        if command == "fit" and "://" not in str(root):  # else fsspec's business
            runs.require_writable(Path(root))

    def instantiate_classes(self) -> None:
        """What the model, the data or the trainer do not accept becomes one sentence."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise UserError(plain(str(error)) or one_line(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """CSV and TensorBoard logs in one run folder, unless --trainer.logger says otherwise; validate and test log nothing."""
        given = self._get(self.config_init, "trainer")
        if self.subcommand != "fit":
            self.save_config_callback = None
        if given.logger is None or given.logger is True:
            kwargs["logger"] = runs.loggers(given.default_root_dir or ".", self._resumed) if self.subcommand == "fit" else False
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Without what --trainer.barebones and --trainer.enable_checkpointing false leave out; a line an epoch where no terminal is."""
        config = dict(config)
        if config["barebones"]:
            # what digits.yaml and this class would set, barebones refuses
            config |= {"log_every_n_steps": None, "logger": None}
            self.save_config_callback = None
        if config["barebones"] or config["enable_checkpointing"] is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        own = config["callbacks"] or []
        has_bar = any(isinstance(callback, ProgressBar) for callback in (own if isinstance(own, list) else [own]))
        if not (config["barebones"] or has_bar or config["enable_progress_bar"] is False or progress.is_watched()):
            callbacks = [*callbacks, progress.EpochLines()]
        return super()._instantiate_trainer(config, callbacks)

    def after_fit(self) -> None:
        """Tests the best checkpoint and draws the log."""
        if not self._get(self.config_init, "trainer").fast_dev_run:
            runs.finish(self.trainer, self.model, self.datamodule)


def run() -> None:
    """Parses the process's arguments and runs the subcommand."""
    quiet()
    defaults = {"default_config_files": [str(digits.CONFIG)]}  # beneath every other configuration
    InterflowCLI(
        Classifier,
        LightningDataModule,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},  # of a run that goes on; a new run has a new folder
        parser_class=Parser,
        parser_kwargs={
            "prog": "interflow",
            "description": "Trains and tests image classifiers with Interflow heads.",
            **{name: {**defaults, "description": DESCRIPTIONS[name]} for name in InterflowCLI.subcommands()},
        },
    )
