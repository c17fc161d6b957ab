"""SVHN's cropped digits: MATLAB files with X [32, 32, 3, N] and y [N, 1], in which the digit 0 has the label 10."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import MissingPackageError, UserError, one_line


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32], uint8, and digits [N], int64. Source: ufldl.stanford.edu/housenumbers.

    UserError where the file is missing, damaged or something else; MissingPackageError without SciPy.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingPackageError('SVHN needs scipy, which is not installed: pip install "interflow-kernels[train]"') from error
    if not path.is_file():
        raise UserError(f"there is no file {path}; --data.download true fetches it")
    try:
        found = loadmat(path, variable_names=("X", "y"))
    except Exception as error:  # by what is damaged, SciPy raises almost anything
        raise UserError(f"{path} is not a MATLAB file that can be read: {one_line(error)}") from error
    images, labels = found.get("X"), found.get("y")
    if images is None or labels is None or images.ndim != 4 or images.shape[:3] != (32, 32, 3) or images.dtype != np.uint8 or labels.size != images.shape[3]:
        raise UserError(f"{path} is not a file of SVHN: it must have bytes X [32, 32, 3, N] and y [N, 1]")
    digits = torch.from_numpy(labels.reshape(-1).astype(np.int64))
    if len(digits) and not (digits.min() >= 1 and digits.max() <= 10):
        raise UserError(f"{path} is not a file of SVHN: its labels must be 1 to 10, they are {digits.min()} to {digits.max()}")
    return torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1))), digits % 10
