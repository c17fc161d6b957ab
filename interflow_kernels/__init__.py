"""Fused kernels for Interflow heads: multi-stage prediction with attention (arXiv 2106.14073)."""

from ._backend import backend
from ._version import __version__
from .functional import interflow_head
from .modules import AuxiliaryHeads, FoldedInterflowHead, FusedInterflowHead, InterflowHead

__all__ = ["AuxiliaryHeads", "FoldedInterflowHead", "FusedInterflowHead", "InterflowHead", "__version__", "backend", "interflow_head"]
