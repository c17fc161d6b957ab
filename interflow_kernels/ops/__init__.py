"""The operators' Python side: a page for each, and how all of them are wired to autograd. Imported only where they exist."""

from . import _flops, _sharding  # noqa: F401  # which register what they say
from .interflow_head import interflow_head
from .interflow_pool import interflow_pool
from .stage_end import stage_end
from .stage_tap import stage_tap

__all__ = ["interflow_head", "interflow_pool", "stage_end", "stage_tap"]
