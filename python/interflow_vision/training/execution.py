"""How a network is run while it trains: the layout of its maps, torch.compile, activation checkpointing. The weights' names stay."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Execution:
    """channels_last: maps pixel by pixel.  compile: forward through torch.compile.  checkpointing: blocks are run again in backward."""

    channels_last: bool = False
    compile: bool = False
    checkpointing: bool = False

    def prepare(self, network: Any) -> None:
        """Sets the network up, once before its training; ValueError where it has no trunk whose blocks could be run again."""
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        if self.checkpointing:
            trunk: Any = getattr(network, "features", None)
            if not hasattr(trunk, "checkpointed"):
                raise ValueError(f"checkpointing needs a trunk in blocks, as VGG has; {type(network).__name__} has none: leave --model.checkpointing away")
            trunk.checkpointed = True
        if self.compile:
            network.compile()
