"""The definitions of the operators in plain PyTorch: short, slow, fp64-capable. Everything else is tested against them.

The head:

    p_i = flatten(adaptive_avg_pool2d(x_i, (Sh, Sw)))     [B, D_i]     pooled
    z_i = p_i W_i^T + b_i                                 [B, K]       branch scores, Z = stack(z_i): [B, n, K]
    y   = attention(Z)                                    [B, K]       logits

B batch, n stages, C_i, H_i, W_i of stage i, (Sh, Sw) pooled size, D_i = C_i * Sh * Sw, D = sum D_i, K classes.
A head with a norm takes p from `interflow_pool`, normalises it, and gives the stages' columns to `interflow_head`.
The end of a stage, on the last convolution's output u [B, C, H, W] and its bias shift [C]:

    v = relu(u + shift),  m = max_pool2d(v, 2, 2) [B, C, H/2, W/2],  p = mean of v over H, W [B, C]

and where a stage has no max-pool, with what a shortcut adds, residual [B, C, H, W]:

    v = act((u + shift) + residual) [B, C, H, W],  p = mean of v over H, W [B, C]

Source: Z. Cai, "Interflow: Aggregating Multi-layer Feature Mappings with Attention Mechanism", arXiv 2106.14073.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTIONS = ("hard", "1xn", "nxn", "classwise", "gated")
"""The attention modes of the public interface. The operator knows one more, "folded": y = sum_i z_i + c, c [K]."""


ACTIVATIONS = ("relu", "none")
"""What the end of a stage does to its sum."""


def autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks of a product with `weight`, None where it is off or leaves the weight alone (fp64)."""
    if weight.dtype == torch.float64:
        return None
    device = weight.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def pooled_stage(x: Tensor, pool_size: tuple[int, int]) -> Tensor:
    """[B, C, H, W] -> [B, C * Sh * Sw], each adaptive window averaged; [B, D_i] is already pooled and returned as it is."""
    if x.dim() == 2 or x.shape[1] == 0:  # PyTorch's pooling of no channel has no gradient
        return x.flatten(1)
    return F.adaptive_avg_pool2d(x, pool_size).flatten(1)


def interflow_pool(features: Sequence[Tensor], pool_size: tuple[int, int] = (1, 1)) -> Tensor:
    """p [B, D]: the pooled features of all stages side by side, in fp32 (fp64 for fp64 features)."""
    dtype = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    return torch.cat([pooled_stage(x, pool_size).to(dtype) for x in features], 1)


def branch_scores(features: Sequence[Tensor], weight: Tensor, bias: Tensor | None, pool_size: tuple[int, int]) -> Tensor:
    """Z [B, n, K]: one fully connected layer for each stage, on its pooled features."""
    pooled = [pooled_stage(x, pool_size).to(weight.dtype) for x in features]
    columns = weight.split([p.shape[1] for p in pooled], dim=1)
    biases: Sequence[Tensor | None] = [None] * len(pooled) if bias is None else bias.unbind(0)
    return torch.stack([F.linear(p, w, b) for p, w, b in zip(pooled, columns, biases, strict=True)], dim=1)


def gates(scores: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """softmax_i(sum_j M_ij Z[b,j,k] + c_i): [B, n, K], the input-dependent weights of "gated"."""
    return torch.softmax(torch.einsum("ij,bjk->bik", matrix, scores) + offset[:, None], dim=1).to(scores.dtype)


def aggregate(scores: Tensor, attention: str, attention_weight: Tensor | None, attention_bias: Tensor | None) -> Tensor:
    """Z [B, n, K] -> y [B, K]; the table of the attention modes, a line each."""
    if attention == "gated":
        assert attention_weight is not None and attention_bias is not None
        return (gates(scores, attention_weight, attention_bias) * scores).sum(1)
    if attention == "folded":
        y = scores.sum(1)
    elif attention == "classwise":
        assert attention_weight is not None
        y = (attention_weight * scores).sum(1)
    elif attention == "nxn":
        assert attention_weight is not None
        mixed = torch.einsum("ji,bik->bjk", attention_weight, scores)
        return (mixed if attention_bias is None else mixed + attention_bias[:, None]).sum(1)
    else:  # "hard", "1xn"
        assert attention_weight is not None
        y = torch.einsum("i,bik->bk", attention_weight, scores)
    return y if attention_bias is None else y + attention_bias


def effective_weights(attention: str, attention_weight: Tensor, num_stages: int, num_classes: int) -> Tensor:
    """A [n, K] with y[b,k] = sum_i A_ik Z[b,i,k] + const, for the modes that are linear in Z."""
    if attention == "classwise":
        return attention_weight
    per_stage = attention_weight.sum(0) if attention == "nxn" else attention_weight
    return per_stage[:, None].expand(num_stages, num_classes)


def interflow_head(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    attention_weight: Tensor | None,
    attention_bias: Tensor | None,
    attention: str,
    pool_size: tuple[int, int] = (1, 1),
) -> tuple[Tensor, Tensor]:
    """features: n of [B, C_i, H_i, W_i] or [B, D_i]; weight [K, D]; bias [n, K] -> y [B, K], Z [B, n, K]."""
    dtype = autocast_dtype(weight) or weight.dtype
    cast = [None if t is None else t.to(dtype) for t in (bias, attention_weight, attention_bias)]
    scores = branch_scores(features, weight.to(dtype), cast[0], pool_size)
    return aggregate(scores, attention, cast[1], cast[2]).to(dtype), scores


def stage_tap(u: Tensor, shift: Tensor | None, max_pool: bool) -> tuple[Tensor | None, Tensor]:
    """u [B, C, H, W], shift [C] or None -> m [B, C, H // 2, W // 2] or None, p [B, C] in fp32 (fp64 for fp64 u)."""
    v = F.relu(u if shift is None else u + shift.to(u.dtype)[:, None, None])
    p = v.mean((2, 3), dtype=torch.float64 if u.dtype == torch.float64 else torch.float32)
    if not max_pool:
        return None, p
    if u.shape[1] == 0 or min(u.shape[2:]) < 2:  # PyTorch's max-pool raises: there is no channel, or no window is complete
        return v[:, :, : u.shape[2] // 2, : u.shape[3] // 2], p
    return F.max_pool2d(v, 2, 2), p


def stage_end(u: Tensor, shift: Tensor | None, residual: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """u, residual [B, C, H, W] or None, shift [C] or None -> v [B, C, H, W] in u's dtype, p [B, C] in fp32 (fp64 for fp64 u)."""
    v = u if shift is None else u + shift.to(u.dtype)[:, None, None]
    if residual is not None:
        v = v + residual.to(u.dtype)
    v = F.relu(v) if activation == "relu" else v.clone() if v is u else v
    return v, v.mean((2, 3), dtype=torch.float64 if u.dtype == torch.float64 else torch.float32)
