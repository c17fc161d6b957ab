"""Fused kernels for Interflow heads: multi-stage prediction with attention (arXiv 2106.14073)."""

from ._backend import backend
from ._version import __version__
from .functional import interflow_head, stage_tap
from .modules import AuxiliaryHeads, FoldedInterflowHead, FusedInterflowHead, InterflowHead, StageTap, conv_tap

__all__ = [
    "AuxiliaryHeads",
    "FoldedInterflowHead",
    "FusedInterflowHead",
    "InterflowHead",
    "StageTap",
    "__version__",
    "backend",
    "conv_tap",
    "interflow_head",
    "stage_tap",
]
