"""The error that the command line turns into one sentence and exit code 2."""

import importlib
from types import ModuleType


class UserError(Exception):
    """Something that was given does not fit: the message is one sentence with the next step, and all that a user needs."""


class MissingPackageError(UserError, ImportError):
    """An optional package is not installed."""


def require(package: str, purpose: str, extra: str) -> ModuleType:
    """The module `package`, imported only here; MissingPackageError, with the line that installs it, where it is missing or does not load."""
    try:
        return importlib.import_module(package)
    except Exception as error:  # a torchvision built for another torch fails with RuntimeError or OSError, not ImportError
        cause = "it is not installed" if isinstance(error, ModuleNotFoundError) else f"it does not load ({one_line(error)})"
        raise MissingPackageError(f'{purpose} needs {package}, but {cause}: pip install "interflow-kernels[{extra}]"') from error


def require_torchvision(purpose: str) -> ModuleType:
    """torchvision, likewise."""
    return require("torchvision", purpose, "vision")


def one_line(error: BaseException) -> str:
    """The message of an error in one line, for the middle or end of a sentence."""
    return " ".join(str(error).split()) or type(error).__name__
