"""Interflow on any backbone: `attach`, the network that it gives, where maps come from, and the ends of stages that are fused."""

from .attaching import attach
from .network import InterflowNetwork
from .timm_registry import register_timm_models

__all__ = ["InterflowNetwork", "attach", "register_timm_models"]
