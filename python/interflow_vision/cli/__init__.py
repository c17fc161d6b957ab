"""The command `interflow`: fit, validate, test and predict; and the demo."""

from .command import main

__all__ = ["main"]
