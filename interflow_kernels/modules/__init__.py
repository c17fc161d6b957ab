"""The package's nn.Modules, a file for each operator or idea."""

from .auxiliary import AuxiliaryHeads
from .folded_head import FoldedInterflowHead
from .interflow_head import FusedInterflowHead, InterflowHead
from .stage_end import StageEnd
from .stage_tap import StageTap, conv_tap

__all__ = ["AuxiliaryHeads", "FoldedInterflowHead", "FusedInterflowHead", "InterflowHead", "StageEnd", "StageTap", "conv_tap"]
