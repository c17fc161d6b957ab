"""What Lightning says, where it belongs: its messages on stdout, so that stderr has warnings and errors only."""

import logging
import sys
import warnings

_NEEDLESS = (
    ".*does not have many workers",  # the digits lie in memory
    ".*Checkpoint directory .* exists and is not empty",  # a resumed run goes on filling its folder,
    ".*Experiment logs directory .* exists and is not empty",  # and runs.loggers has kept its log
    "The dirpath has changed from",  # validate and test have no checkpoints of their own
    ".*isinstance\\(treespec, LeafSpec\\).* is deprecated",  # Lightning's own use of torch
)


def quiet() -> None:
    """Sends Lightning's messages to stdout, without its advertisement, and drops the warnings that ask nothing of a user."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stdout)
                handler.addFilter(lambda record: "litlogger" not in record.getMessage())
    for message in _NEEDLESS:
        warnings.filterwarnings("ignore", message=message)
