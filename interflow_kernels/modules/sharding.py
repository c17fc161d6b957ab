"""Whether a head's parameters are whole here: FSDP and DTensor leave each process a part."""

from typing import Any

from torch import Tensor

GATHER = (
    "gather first: head.unshard() under FSDP2, FullyShardedDataParallel.summon_full_params(model) under FSDP, or give a head the full state_dict "
    "(torch.distributed.checkpoint.state_dict.get_model_state_dict)"
)


def require_whole(what: str, parameters: dict[str, tuple[Any, tuple[int, ...]]]) -> None:
    """Raises ValueError unless each parameter, given with the shape that it has when whole, is a plain tensor of that shape, or None."""
    for name, (tensor, shape) in parameters.items():
        if tensor is None:
            continue
        if hasattr(tensor, "placements") and hasattr(tensor, "full_tensor"):
            raise ValueError(f"{what} needs whole parameters, but {name} is a DTensor, {tuple(tensor.placements)}; {GATHER}")
        if isinstance(tensor, Tensor) and tuple(tensor.shape) != shape:
            raise ValueError(f"{what} needs whole parameters, but {name} has shape {tuple(tensor.shape)} instead of {shape}; {GATHER}")
