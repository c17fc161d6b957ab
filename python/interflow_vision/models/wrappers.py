"""Modules that are run in another way but compute what they hold computes: what lies inside."""

from torch import nn

from interflow_kernels.modules.plain import altered

_WRAPPERS = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "CheckpointWrapper"): "_checkpoint_wrapped_module",
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "OffloadWrapper"): "_checkpoint_wrapped_module",
    ("torch.nn.modules.container", "Sequential"): "",
}
"""Class -> the name of the one module inside, "" for any. By name, so that nothing need be imported to compare."""


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch.compile, checkpoint_wrapper, offload_wrapper and an nn.Sequential of one, however often they are nested.

    What holds sharded parameters (FSDP), changes the result (LoRA, hooks) or is unknown is left as it is.
    """
    while True:
        name = _WRAPPERS.get((type(module).__module__, type(module).__qualname__))
        inside = list(module._modules.items())
        if name is None or len(inside) != 1 or (name and inside[0][0] != name) or inside[0][1] is None or _hooked(module):
            return module
        module = inside[0][1]


def _hooked(module: nn.Module) -> bool:
    if "_orig_mod" not in module._modules:
        return altered(module)
    # torch.compile gives its wrapper a forward of its own
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
