"""The head's first half as an operator of its own, for what stands between pooling and product (a norm): handle, fake, autograd, vmap.

    interflow_pool(features, pool_size) -> pooled [B, D], with the bits of interflow_head's third result

It is linear: backward needs no kernel and keeps no map. A map's gradient is the pooled one expanded, stride 0 (_pooling.py). Autocast
needs nothing: features come in any dtype, sums are kept in fp32. How differentiation is wired: see _wiring.py.
"""

from typing import Any

import torch
from torch import Tensor

from .._namespace import NAMESPACE
from .._tracing import EAGER, FORWARD_MODE, OPERATOR
from ._autograd_kernels import register_autograd
from ._library import OPERATORS, library
from ._pooling import feature_gradients, pooled_width, remember_features
from ._refusals import one_device
from ._wiring import accumulation_dtype, below_autograd, builds_no_graph, forward_mode_raises

raw_interflow_pool = OPERATORS.interflow_pool.default

_NO_FORWARD_MODE = "interflow_pool: forward-mode differentiation (jvp, jacfwd, hessian) is not implemented; use the head's to_eager(), or backend('eager')"


@torch.library.register_fake(f"{NAMESPACE}::interflow_pool", lib=library)
def _(features, pool_size):  # type: ignore[no-untyped-def]
    one_device("interflow_pool", features)
    width = sum(pooled_width(x, pool_size) for x in features)
    return features[0].new_empty((features[0].shape[0], width), dtype=accumulation_dtype(features[0]))


# --- (a) the raw operator differentiates ---------------------------------------------------------------------------------
def _raw_setup(ctx: Any, inputs: Any, output: Any) -> None:
    features, pool_size = inputs
    ctx.feature_stages = [i for i, x in enumerate(features) if x.requires_grad]
    remember_features(ctx, pool_size, features)


def _raw_backward(ctx: Any, dp: Tensor) -> Any:
    return feature_gradients(ctx, dp), None


register_autograd("interflow_pool", _raw_backward, _NO_FORWARD_MODE, _raw_setup)


# --- (b) the modules' own Function -----------------------------------------------------------------------------------------
class InterflowPoolFunction(torch.autograd.Function):
    """Arguments: pool_size, *features."""

    @staticmethod
    def forward(pool_size: Any, *features: Tensor) -> Tensor:
        return below_autograd(raw_interflow_pool, list(features), pool_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pool_size, *features = inputs
        ctx.feature_stages = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        remember_features(ctx, pool_size, features)

    @staticmethod
    def backward(ctx: Any, dp: Any) -> Any:
        return None, *feature_gradients(ctx, dp)

    @staticmethod
    def vmap(info: Any, in_dims: Any, pool_size: Any, *features: Tensor) -> Any:
        joined = []  # the mapped dimension joins the batch
        for x, d in zip(features, in_dims[1:], strict=True):
            x = x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
            joined.append(x.flatten(0, 1))
        return _call(pool_size, *joined).unflatten(0, (info.batch_size, -1)), 0


_pool = forward_mode_raises(InterflowPoolFunction, _NO_FORWARD_MODE)


def _call(pool_size: Any, *features: Tensor) -> Tensor:
    if not torch._C._are_functorch_transforms_active() and builds_no_graph(features):
        return below_autograd(raw_interflow_pool, list(features), pool_size)
    return _pool().apply(pool_size, *features)


def interflow_pool(features: list[Tensor], pool_size: tuple[int, int], route: str = EAGER) -> Tensor:
    """features n of [B, C_i, H_i, W_i] or [B, D_i], checked -> p [B, D] in fp32, fp64 for fp64 features.

    route: who records the call, by _tracing.route(); not PLAIN.
    """
    if route == FORWARD_MODE:
        raise NotImplementedError(_NO_FORWARD_MODE)
    if route == OPERATOR:
        return raw_interflow_pool(features, pool_size)
    return _call(pool_size, *features)
