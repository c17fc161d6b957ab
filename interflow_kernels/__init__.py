"""Fused kernels for Interflow heads: multi-stage prediction with attention (arXiv 2106.14073).

A call goes down through these layers, and imports run downwards only (tests/test_layers.py):

1. modules/       parameters and states; nn.Module's side of everything
2. functional     the documented functions: check the arguments (_options, _validate), choose a backend (_backend), call
3. ops/           the operators to PyTorch: fakes, autograd, autocast, vmap
4. triton/        registration of the Triton kernels, a folder for each operator, what they share in common/
   _native        loads the compiled kernels (csrc/)
5. reference      the definitions in plain PyTorch; _tap_format, _tracing, _fx, _onnx, _on_import, _namespace: nothing above them

Beside them stand the programs `python -m interflow_kernels.info` and `python -m interflow_kernels.triton.tune`, and `testing`.
"""

from ._backend import backend
from ._native import operator_library as library_path
from ._version import __version__
from .functional import interflow_head, stage_end, stage_tap
from .modules import AuxiliaryHeads, FoldedInterflowHead, FusedInterflowHead, InterflowHead, StageEnd, StageTap, conv_tap

__all__ = [
    "AuxiliaryHeads",
    "FoldedInterflowHead",
    "FusedInterflowHead",
    "InterflowHead",
    "StageEnd",
    "StageTap",
    "__version__",
    "backend",
    "conv_tap",
    "interflow_head",
    "library_path",
    "stage_end",
    "stage_tap",
]
