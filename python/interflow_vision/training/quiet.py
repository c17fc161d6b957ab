"""What Lightning says, where it belongs: its messages on stdout, so that stderr has warnings and errors only."""

import logging
import sys
import warnings
from typing import TextIO

_NEEDLESS = (
    ".*does not have many workers",  # the digits lie in memory
    ".*Checkpoint directory .* exists and is not empty",  # a resumed run goes on filling its folder,
    ".*Experiment logs directory .* exists and is not empty",  # and runs.loggers has kept its log
    "The dirpath has changed from",  # validate and test have no checkpoints of their own
    "Your `IterableDataset` has `__len__` defined",  # shards know their number of batches
    ".*isinstance\\(treespec, LeafSpec\\).* is deprecated",  # Lightning's own use of torch
)


class _ToStdout(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever sys.stdout is when something is said, all but Lightning's advertisement."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    def filter(self, record: logging.LogRecord) -> bool:
        return "litlogger" not in record.getMessage()


def quiet() -> None:
    """Sends Lightning's messages to stdout, without its advertisement, and drops the warnings that ask nothing of a user."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        for handler in logger.handlers[:]:
            if type(handler) is logging.StreamHandler:  # not those that write to files, which are such handlers too
                logger.removeHandler(handler)
                logger.addHandler(_ToStdout())
    for message in _NEEDLESS:
        warnings.filterwarnings("ignore", message=message)
