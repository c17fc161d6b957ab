"""FSDP2 by a flag: `--trainer.strategy fsdp2` shards weights, gradients and the optimiser's state over all processes."""

from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from ..models.wrappers import unwrapped

NAME = "fsdp2"


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with all processes in one group of data parallelism, and this package's networks sharded.

    Checkpoints hold whole tensors in one file, as those of every other strategy: `interflow predict` reads them, and a run goes on from
    them with any number of processes.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)

    def setup_environment(self) -> None:
        """Also tells the module how it is sharded: Lightning asks its configure_model."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        module = self.lightning_module
        assert module is not None
        module.configure_model = MethodType(_configure_model, module)  # type: ignore[method-assign]
        super().setup_environment()


def _configure_model(module: LightningModule) -> None:
    mesh = module.device_mesh
    assert mesh is not None
    shard(module.model, mesh["data_parallel"])


def shard(network: Any, mesh: Any) -> None:
    """Shards each convolution and fully connected layer of the trunk by itself, then the rest, over the mesh; once."""
    if getattr(network, "_is_sharded", False):
        return
    layers = [layer for layer in getattr(network, "features", nn.ModuleDict()).values() if isinstance(unwrapped(layer), (nn.Conv2d, nn.Linear))]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    for name in ("forward_branches", "forward_features", "forward_maps"):  # what is called beside forward
        if hasattr(network, name):
            register_fsdp_forward_method(network, name)
    network._is_sharded = True


def register() -> None:
    """Makes the name known to the Trainer."""
    if NAME not in StrategyRegistry:
        StrategyRegistry.register(NAME, FSDP2Strategy, description="FSDP2: weights, gradients and optimiser state sharded over all processes")
