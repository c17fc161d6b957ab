"""bench/ for tests: its modules, which are scripts and not installed, and samples as a busy machine gives them."""

import importlib
import sys
from pathlib import Path

import numpy as np

BENCH = Path(__file__).parent.parent / "bench"


def room(name):
    """A module of bench/, which is a folder of scripts and not installed."""
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCH))


def drifting(generator, rounds):
    """Relative slowness of a shared machine, round by round: slow waves and sudden stalls, which all providers of a round meet."""
    wave = np.cumsum(generator.normal(0, 0.05, rounds))
    return np.exp(wave) * np.where(generator.random(rounds) < 0.1, 3.0, 1.0)
