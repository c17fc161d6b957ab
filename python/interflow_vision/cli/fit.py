"""LightningCLI with this package's model, data and run folders: what `interflow fit`, `validate` and `test` are."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning_utilities.core.rank_zero import rank_zero_info

from ..errors import UserError, one_line
from ..training import checkpoints, checks, elastic, progress, resume_options, runs, sharding
from ..training.checkpoint_io import SafeCheckpointIO, remove_leftovers
from ..training.classifier import Classifier
from ..training.quiet import quiet
from ..training.resume_state import KeepRandomStates
from ..training.signals import GradientNorms
from ..training.stopping import StopOnSignal, ending_together
from ..training.throughput import DataWait
from . import digits
from .options import HelpAll, Parser, plain

DESCRIPTIONS = {
    "fit": "Trains a model, tests its best checkpoint and draws the curves. Without options: VGG-16-BN with Interflow on handwritten digits.",
    "validate": "Evaluates the checkpoint that --ckpt_path names on the validation images.",
    "test": "Evaluates the checkpoint that --ckpt_path names on the test images.",
}


class InterflowCLI(LightningCLI):
    """`fit`, `validate`, `test` with Lightning's own options; after `fit` the best checkpoint is tested and the log drawn.

    Every run has a folder `version_N` below `trainer.default_root_dir`, with config.yaml, metrics.csv, TensorBoard's
    events, checkpoints/{best,last}.ckpt and curves.png. `--ckpt_path` takes a file, the folder of a run, or `last` or `best`
    of the newest run that has one.

    With it, model and data are the checkpoint's. `fit` goes on in the run's folder from its last checkpoint, with the run's
    config.yaml beneath the command line; from any other checkpoint it makes a new folder. What is given beside it and differs
    is followed where it can be (resume_options.py), and refused in one sentence where not.
    """

    _resumed: Path | None = None  # the run folder that goes on
    _step: int | None = None  # of the checkpoint

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
        root = self.config[command].trainer.default_root_dir or "."
        if command == "fit" and self.config[command].ckpt_path is None:
            self.config[command].ckpt_path = elastic.checkpoint(Path(root))
        if self.config[command].ckpt_path is not None:
            self._parse_with_checkpoint(parser, args, command, Path(root))
            root = self.config[command].trainer.default_root_dir or "."
        elif command != "fit":
            raise UserError(f"`interflow {command}` needs --ckpt_path: best, last (of the newest run below {root}), the folder of a run, or a checkpoint file")
        if command == "fit" and "://" not in str(root):  # else fsspec's business
            runs.require_writable(Path(root))
            for run in runs.all_runs(Path(root)):
                remove_leftovers(run / "checkpoints")

    def _parse_with_checkpoint(self, parser: LightningArgumentParser, args: ArgsType, command: str, root: Path) -> None:
        """Parses again, with the checkpoint's model and data as defaults: what then differs was asked for."""
        path = runs.checkpoint(str(self.config[command].ckpt_path), root, "last" if command == "fit" else "best")
        content = checkpoints.read(path)
        options = resume_options.kept(content, runs.run_of(path))
        if command == "fit":
            self._resumed, self._step = runs.goes_on_in(path), content["global_step"]
            checks.require_epochs_left(path, content, self.config[command].trainer.max_epochs)
        config = None if self._resumed is None else self._resumed / "config.yaml"
        with resume_options.beneath(self._parser(command), config if config is not None and config.is_file() else None, options):
            super().parse_arguments(parser, args)
        given = self.config[command]
        for line in resume_options.changes(command, options, {"model": given.model.as_dict(), "data": given.data.as_dict()}):
            rank_zero_info(line)
        given.ckpt_path = str(path)
        if self._resumed is not None:
            given.trainer.default_root_dir = str(self._resumed.parent)

    def _parse_ckpt_path(self) -> None:
        """Lightning's way to take the checkpoint's options, over those of the command line; ours is above."""

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
            kwargs["logger"] = runs.loggers(given.default_root_dir or ".", self._resumed, self._step) if self.subcommand == "fit" else False
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not one that was given with --trainer.plugins
            trainer.strategy.checkpoint_io = SafeCheckpointIO()
        return trainer

    def fit(self, **kwargs: Any) -> None:
        """Trainer.fit, where errors and signals end all processes."""
        with ending_together(self.trainer):
            self.trainer.fit(**kwargs)

    def validate(self, **kwargs: Any) -> None:
        """Trainer.validate, likewise."""
        with ending_together(self.trainer):
            self.trainer.validate(**kwargs)

    def test(self, **kwargs: Any) -> None:
        """Trainer.test, likewise."""
        with ending_together(self.trainer):
            self.trainer.test(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Without what --trainer.barebones and --trainer.enable_checkpointing false leave out; a line an epoch where no terminal is."""
        config = dict(config)
        if config["barebones"]:
            # what digits.yaml and this class would set, barebones refuses
            config |= {"log_every_n_steps": None, "logger": None}
            self.save_config_callback = None
        if config["barebones"] or config["enable_checkpointing"] is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
            ours = [callback for callback in self.trainer_defaults["callbacks"] if not isinstance(callback, Checkpoint)]
            self.trainer_defaults = {**self.trainer_defaults, "callbacks": ours}
        own = config["callbacks"] or []
        has_bar = any(isinstance(callback, ProgressBar) for callback in (own if isinstance(own, list) else [own]))
        if not (config["barebones"] or has_bar or config["enable_progress_bar"] is False):
            callbacks = [*callbacks, *progress.default_bar()]
        return super()._instantiate_trainer(config, callbacks)

    def after_fit(self) -> None:
        """Tests the best checkpoint and draws the log."""
        if not self._get(self.config_init, "trainer").fast_dev_run:
            with ending_together(self.trainer):
                runs.finish(self.trainer, self.model, self.datamodule)


def run() -> None:
    """Parses the process's arguments and runs the subcommand."""
    quiet()
    sharding.register()
    defaults = {"default_config_files": [str(digits.CONFIG)]}  # beneath every other configuration
    InterflowCLI(
        Classifier,
        LightningDataModule,
        subclass_mode_data=True,
        trainer_defaults={"callbacks": [KeepRandomStates(), StopOnSignal(), GradientNorms(), DataWait()]},
        save_config_kwargs={"overwrite": True},  # of a run that goes on; a new run has a new folder
        parser_class=Parser,
        parser_kwargs={
            "prog": "interflow",
            "description": "Trains and tests image classifiers with Interflow heads.",
            **{name: {**defaults, "description": DESCRIPTIONS[name]} for name in InterflowCLI.subcommands()},
        },
    )
