"""Packages that only some formats and engines need: imported where they are used, missed in one sentence."""

import importlib
from typing import Any

from ..errors import MissingPackageError, one_line


def require(purpose: str, *packages: str) -> Any:
    """The first of the packages, all of them imported; MissingPackageError where one is missing or does not load."""
    for package in packages:
        try:
            importlib.import_module(package)
        except Exception as error:  # one built for another numpy or torch fails with what it likes
            cause = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not load ({one_line(error)})"
            raise MissingPackageError(f'{purpose} needs the package {package}, which {cause}: pip install "interflow-kernels[serve]"') from error
    return importlib.import_module(packages[0])
