"""The head as modules: InterflowHead (plain PyTorch, the definition) and FusedInterflowHead (the same, fused)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import _fx, _options, _tracing, _validate, functional, reference
from ._norm import new_norm, normalised, scale_and_shift
from ._twin import only_read, recompute, twin
from .folded_head import FoldedInterflowHead
from .sharding import require_whole

# weight [K, D], bias [n, K], attention_weight, attention_bias
Parameters = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


class InterflowHead(nn.Module):
    """n feature maps in, class scores out: pooled, one fully connected layer a stage, the n branches weighed by attention.

        p_i = flatten(adaptive_avg_pool2d(x_i, pool_size)),  z_i = p_i W_i^T + b_i,  y = attention(stack(z_i))
        norm="batch":  z_i = p'_i W_i^T + b_i,  p'_i = gamma_i (p_i - mean) / std + beta_i

    | attention   | attention_weight (+ attention_bias)  | y[b,k]                                                    |
    |-------------|--------------------------------------|-----------------------------------------------------------|
    | "hard"      | w [n], set by the user, a buffer     | sum_i w_i Z[b,i,k]                                        |
    | "1xn"       | w [n] (+ c [1])                      | sum_i w_i Z[b,i,k] (+ c)                                  |
    | "nxn"       | M [n, n] (+ c [n])                   | sum_j (sum_i M_ji Z[b,i,k] (+ c_j))                       |
    | "classwise" | A [n, K] (+ c [K])                   | sum_i A_ik Z[b,i,k] (+ c_k)                               |
    | "gated"     | M [n, n], always c [n]               | sum_i softmax_i(sum_j M_ij Z[b,j,k] + c_i) Z[b,i,k]       |

    Every mode starts as the mean of its branches. The first four reach the same set of functions (one fully connected
    layer on the concatenated p_i) and differ in how they train; "nxn" and "classwise" are two readings of one sentence
    of the source. "gated" is ours.

    Args:
        in_channels: C_i of each stage, 1 to 16 stages.
        num_classes: K.
        attention: one of the table.
        pool_size: (Sh, Sw), the size each map is adaptively averaged to.
        layout: "NCHW" or "NHWC", one for all stages or one each; "NHWC" takes [B, H, W, C] or tokens [B, N, C].
        bias: whether the branches have a bias b [n, K].
        attention_bias: whether the attention has a bias c ("gated" always has one, "hard" never).
        hard_weights: w for "hard"; default 1/n each.
        norm: None, the source as written, or "batch": an nn.BatchNorm1d over the columns of p, `head.norm`, for branches whose means vary little
            from image to image beside their size, as those of large maps do. Training takes the batch's statistics, of at least 2 images,
            evaluation the running ones; nn.SyncBatchNorm.convert_sync_batchnorm converts it.
        branch_loss: weight of each branch's own loss in `loss`; 0: the loss of y alone.

    Shapes: feature i is [B, C_i, H_i, W_i], or [B, D_i] already pooled, D_i = C_i * Sh * Sw; logits are [B, K]. Features come
    in a list, a tuple or a mapping, whose values are taken in its order.
    Parameters: weight [K, D] with the stages' columns in order, bias [n, K], attention_weight, attention_bias.

    Raises ValueError or TypeError, one sentence each, on arguments or features that do not fit.
    Source: Z. Cai, arXiv 2106.14073.
    """

    weight: Tensor  # [K, D]
    bias: Tensor | None  # [n, K]
    attention_weight: Tensor
    attention_bias: Tensor | None
    norm: nn.Module | None

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        attention: str = "nxn",
        *,
        pool_size: int | tuple[int, int] = 1,
        layout: str | Sequence[str] = "NCHW",
        bias: bool = True,
        attention_bias: bool = False,
        hard_weights: Sequence[float] | Tensor | None = None,
        norm: str | None = None,
        branch_loss: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = _options.positive_ints(in_channels, "in_channels")
        self.num_stages = len(self.in_channels)  # n
        _options.stage_count(self.num_stages, "in_channels")
        self.num_classes = _options.class_count(num_classes)
        self.attention = _options.attention_mode(attention)
        self.pool_size = _options.pair(pool_size, "pool_size")
        self.layout = _options.layouts(layout, self.num_stages)
        bias, attention_bias = _options.flag(bias, "bias"), _options.flag(attention_bias, "attention_bias")
        if attention == "hard" and attention_bias:
            raise ValueError("attention_bias must be False for attention='hard', whose weights are not trained")
        if attention != "hard" and hard_weights is not None:
            raise ValueError(f"hard_weights must be None for attention={attention!r}; they belong to attention='hard'")
        self.hard_weights = None if hard_weights is None else _validate.hard_weights(hard_weights, self.num_stages)
        self.branch_loss = _options.loss_weight(branch_loss, "branch_loss")
        factory = _options.factory(device, dtype)
        _options.weight_size(self.in_channels, self.num_classes, self.pool_size)

        n, k = self.num_stages, self.num_classes
        bins = self.pool_size[0] * self.pool_size[1]
        self.widths = tuple(c * bins for c in self.in_channels)  # D_i
        self.weight = nn.Parameter(torch.empty(k, sum(self.widths), **factory))
        self.bias = nn.Parameter(torch.empty(n, k, **factory)) if bias else None
        shape, bias_shape = _validate.attention_shapes(attention, n, k)
        if attention == "hard":
            self.register_buffer("attention_weight", torch.empty(shape, **factory))
        else:
            self.attention_weight = nn.Parameter(torch.empty(shape, **factory))
        has_bias = attention_bias or attention == "gated"
        self.attention_bias = nn.Parameter(torch.empty(bias_shape or (), **factory)) if has_bias else None
        self.norm = new_norm(norm, sum(self.widths), **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Each slice of `weight` as `nn.Linear(D_i, K)` starts; every attention as the mean of its branches."""
        for i, width in enumerate(self.widths):
            # nn.Linear: kaiming_uniform_(a=sqrt(5)) is U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the bias's range too.
            bound = 1 / math.sqrt(width)
            self.branch_weight(i).uniform_(-bound, bound)
            if self.bias is not None:
                self.bias[i].uniform_(-bound, bound)
        n = self.num_stages
        if self.attention == "gated":
            self.attention_weight.zero_()
        elif self.attention == "nxn":
            self.attention_weight.zero_().fill_diagonal_(1 / n)
        elif self.hard_weights is not None:
            self.attention_weight.copy_(torch.tensor(self.hard_weights, dtype=torch.float64))
        else:
            self.attention_weight.fill_(1 / n)
        if self.attention_bias is not None:
            self.attention_bias.zero_()
        if isinstance(self.norm, _BatchNorm):
            self.norm.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone: all but `weight`.

        The attention and the branch bias b [n, K] are no weights of inputs, although they have two dimensions, by which timm and
        others choose. Where parameters are computed (parametrizations, weight_norm, pruning): of what those of `weight` are not computed from.
        """
        return {
            name for name, _ in self.named_parameters() if not name.removeprefix("parametrizations.").startswith(("weight.", "weight_")) and name != "weight"
        }

    def branch_weight(self, i: int) -> Tensor:
        """W_i [K, D_i]: a view of `weight`."""
        return self._branch_weight(self.weight, i)

    def _branch_weight(self, weight: Tensor, i: int) -> Tensor:
        number = _options.integer(i)
        if number is None:
            raise TypeError(f"i must be an int, got {_options.shown(i)}")
        if not -self.num_stages <= number < self.num_stages:
            raise IndexError(f"i must be one of the {self.num_stages} stages, got {number}")
        number %= self.num_stages
        start = sum(self.widths[:number])
        return weight[:, start : start + self.widths[number]]

    def forward(self, features: Sequence[Tensor] | Mapping[str, Tensor]) -> Tensor:
        """n features -> logits y [B, K]."""
        parameters = self._read()
        try:
            checked = self._checked(features, parameters[0])
        except TypeError:
            return _fx.leaf(self, features)
        return self._run(checked, False, parameters)[0]

    def forward_branches(self, features: Sequence[Tensor] | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """n features -> logits y [B, K] and branch scores Z [B, n, K]."""
        if self._forward_pre_hooks:  # a call of the module runs them, a call of this method does not
            recompute(self)
        parameters = self._read()
        try:
            checked = self._checked(features, parameters[0])
        except TypeError:
            return _fx.leaf(self, features, method="forward_branches")
        y, branches = self._run(checked, True, parameters)
        assert branches is not None
        return y, branches

    def _read(self) -> Parameters:
        """(weight, bias, attention_weight, attention_bias), each read once: a parametrized one is computed by being read."""
        # Straight from the dict where they lie there: nn.Module.__getattr__ costs 0.4 us a name, a tenth of the call in all.
        # Parametrized ones and buffers take the usual way, and only they: dict.get would read the attribute in any case.
        held = self._parameters
        weight = held["weight"] if "weight" in held else self.weight  # noqa: SIM401
        bias = held["bias"] if "bias" in held else self.bias  # noqa: SIM401
        attention_weight = held["attention_weight"] if "attention_weight" in held else self.attention_weight  # noqa: SIM401
        attention_bias = held["attention_bias"] if "attention_bias" in held else self.attention_bias  # noqa: SIM401
        return weight, bias, attention_weight, attention_bias  # type: ignore[return-value]  # weights are never None

    def _whole(self, what: str) -> Parameters:
        """As `_read`; ValueError where FSDP or DTensor leave this process a part."""
        parameters = self._read()
        n, k = self.num_stages, self.num_classes
        shapes = ((k, sum(self.widths)), (n, k), *_validate.attention_shapes(self.attention, n, k))
        names = ("weight", "bias", "attention_weight", "attention_bias")
        require_whole(what, {name: (tensor, shape or ()) for name, tensor, shape in zip(names, parameters, shapes, strict=True)})
        return parameters

    def _checked(self, features: Sequence[Tensor] | Mapping[str, Tensor], weight: Tensor) -> list[Tensor]:
        return _validate.features(features, weight, self.num_stages, self.pool_size, self.layout, self.in_channels)

    def _run(self, features: list[Tensor], need_branches: bool, parameters: Parameters) -> tuple[Tensor, Tensor | None]:
        """The one method that FusedInterflowHead overrides: checked NCHW features -> y, and Z where it is needed."""
        norm = self._modules.get("norm")
        if norm is not None:
            features = normalised(norm, reference.interflow_pool(features, self.pool_size), self.widths, parameters[0].dtype)
        return reference.interflow_head(features, *parameters, self.attention, self.pool_size)

    def loss(self, output: Tensor | tuple[Tensor, Tensor], target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """CE(y) + branch_loss * sum_i CE(z_i), cross entropies in nats, means over the batch; scalar.

        output: y [B, K] and Z [B, n, K] as `forward_branches` gives them; without a branch_loss y alone, as `forward` does, will do.
        target: class numbers [B] or probabilities [B, K]. Raises ValueError or TypeError, one sentence, on what does not fit.
        """
        given = output if isinstance(output, (tuple, list)) else (output, None)
        if len(given) != 2:
            raise ValueError(f"output must be y [B, K], or y and Z [B, n, K] as forward_branches gives them, got {len(given)} values")
        logits, branches = given
        _validate.logits(logits, target, self.num_classes)
        total = F.cross_entropy(logits, target, label_smoothing=label_smoothing)
        if self.branch_loss == 0:
            return total
        if branches is None:
            raise ValueError(f"output must be y and Z, as forward_branches gives them, for branch_loss={self.branch_loss}, got y alone")
        _validate.scores(branches, target, self.num_stages, self.num_classes)
        each = F.cross_entropy(branches.flatten(0, 1), target.repeat_interleave(self.num_stages, 0), label_smoothing=label_smoothing)
        return total + self.branch_loss * self.num_stages * each  # a mean over B n scores: n times it is the sum of the branches' losses

    def stage_weights(self, features: Sequence[Tensor] | Mapping[str, Tensor] | None = None) -> Tensor:
        """The effective weight of each branch: A [n, K] with y = sum_i A_i Z_i + const; for "gated" the softmax of the given features, [B, n, K].

        Raw weights trade against the scale of W_i: they are no measure of how much a branch contributes.
        Raises ValueError for "gated" without features.
        """
        with torch.no_grad(), only_read(self):
            weight, _, attention_weight, attention_bias = parameters = self._whole("stage_weights")
            if self.attention != "gated":
                return reference.effective_weights(self.attention, attention_weight, self.num_stages, self.num_classes).clone()
            if features is None:
                raise ValueError("features must be given for attention='gated', whose weights depend on the input")
            assert attention_bias is not None
            _, scores = self._run(self._checked(features, weight), True, parameters)
            assert scores is not None
            return reference.gates(scores.to(weight.dtype), attention_weight, attention_bias)

    @torch.no_grad()
    def fold(self) -> FoldedInterflowHead:
        """The head for inference: W'_i[k,:] = A_ik W_i[k,:], b'_k = sum_i A_ik b_i[k] + c_k, so y = sum_i p_i W'_i^T + b'.

        A norm goes into W_i and b_i first, with its running statistics (`without_norm`).
        Returns a new module; this one stays as it is. Parametrized, weight-normed and pruned parameters are folded as they are
        in eval mode. Raises ValueError for "gated", which is not linear in Z, for a norm without running statistics, and for parameters of
        which this process has only a part.
        """
        if self.attention == "gated":
            raise ValueError("attention='gated' cannot be folded: its weights depend on the input")
        n, k = self.num_stages, self.num_classes
        with only_read(self):
            own, own_bias, attention_weight, attention_bias = self._whole("fold")
            weight, bias_of = self._without_norm(own, own_bias)
        a = reference.effective_weights(self.attention, attention_weight.double(), n, k)  # [n, K]
        weight = torch.cat([a[i][:, None] * self._branch_weight(weight, i) for i in range(n)], 1)
        bias = torch.zeros(k, dtype=torch.float64, device=weight.device)
        if bias_of is not None:
            bias += (a * bias_of).sum(0)
        if attention_bias is not None:
            bias += attention_bias.double().sum() if self.attention == "nxn" else attention_bias.double()
        return FoldedInterflowHead(self.in_channels, weight.to(own.dtype), bias.to(own.dtype), self.pool_size, self.layout, fused=self._fused)

    def _without_norm(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """weight [K, D] and bias [n, K] in fp64 with the norm folded in: W'_i = W_i s_i, b'_i = b_i + W_i t_i for norm(p) = s p + t."""
        weight, bias = weight.double(), None if bias is None else bias.double()
        if self.norm is None:
            return weight, bias
        scale, shift = scale_and_shift(self.norm)
        moved = torch.stack([part.sum(1) for part in (weight * shift).split(self.widths, 1)])  # [n, K]
        return weight * scale, moved if bias is None else bias + moved

    @torch.no_grad()
    def without_norm(self) -> "InterflowHead":
        """A new head of this kind in eval mode whose norm is folded into weight and bias, with its running statistics; this one stays as it is.

        The scores of eval mode stay the same, but for rounding; every attention can be folded so, "gated" too. Computed parameters become
        plain ones. Raises ValueError for a norm without running statistics.
        """
        with only_read(self):
            own, own_bias, attention_weight, attention_bias = self._read()
            weight, bias = self._without_norm(own, own_bias)
        kind = FusedInterflowHead if self._fused else InterflowHead
        head = kind(**{**self._config(), "norm": None, "bias": bias is not None}, device=own.device, dtype=own.dtype)
        for name, value in (("weight", weight), ("bias", bias), ("attention_weight", attention_weight), ("attention_bias", attention_bias)):
            if value is not None:
                getattr(head, name).copy_(value)
        return head.eval()

    _fused = False

    def _config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        with torch.no_grad(), only_read(self):
            _, bias, _, attention_bias = self._read()
        return {
            "in_channels": self.in_channels,
            "num_classes": self.num_classes,
            "attention": self.attention,
            "pool_size": self.pool_size,
            "layout": self.layout,
            "bias": bias is not None,
            "attention_bias": attention_bias is not None,
            "hard_weights": self.hard_weights,
            "norm": None if self.norm is None else "batch",
            "branch_loss": self.branch_loss,
        }

    __prepare_scriptable__ = _tracing.no_script

    def extra_repr(self) -> str:
        parts = [f"in_channels={self.in_channels}", f"num_classes={self.num_classes}", f"attention={self.attention!r}"]
        if self.pool_size != (1, 1):
            parts.append(f"pool_size={self.pool_size}")
        if "NHWC" in self.layout:
            parts.append(f"layout={self.layout}")
        if self.branch_loss:
            parts.append(f"branch_loss={self.branch_loss}")
        with torch.no_grad(), only_read(self):
            parameters = self._read()
        for name, tensor in zip(("weight", "bias", "attention_weight", "attention_bias"), parameters, strict=True):
            parts.append(f"{name}={None if tensor is None else list(tensor.shape)}")
        return ", ".join(parts)


class FusedInterflowHead(InterflowHead):
    """InterflowHead in one fused kernel: the same parameters and `state_dict`, the same results, less memory traffic.

    Forward pools every stage, multiplies and aggregates in one operator; backward writes nothing of a feature map's size:
    a map's gradient is an expanded (stride 0) view of the pooled one. Where no kernel serves the device the plain path runs,
    with one warning that says why (`python -m interflow_kernels.info`). Arguments, shapes and errors: see InterflowHead.

    Such a view is what a hook on a map, the hooks of the module that made it, and torch.autograd.grad get. PyTorch refuses
    to change it in place or to .view(-1) it: give back a new tensor (g * 2, g.clamp(-1, 1)), take g.reshape(-1), or make it
    dense first, `x.register_hook(lambda g: g.contiguous())`, after which later hooks may do both. The .grad of a leaf is
    dense anyway. With a pool_size other than 1 no gradient is such a view.

    NaN and infinities stand in the results where InterflowHead's are, but for numbers that overflow only on its way there: see
    `interflow_head`.
    """

    _fused = True

    def _run(self, features: list[Tensor], need_branches: bool, parameters: Parameters) -> tuple[Tensor, Tensor | None]:
        norm = self._modules.get("norm")
        if norm is not None:  # the pooling half gives p, the whole operator takes p' as pooled features: no map is read twice
            features = normalised(norm, functional.run_pool(features, self.pool_size), self.widths, parameters[0].dtype)
        return functional.run_head(features, *parameters, self.attention, self.pool_size, need_branches)

    @classmethod
    def from_eager(cls, head: InterflowHead) -> "FusedInterflowHead":
        """The fused head with the parameters of `head`: the same tensors, so both train together.

        What moves or casts one in place, such as .to(device), does so to the other: pass copy.deepcopy(head) for a head of its own.

        Parametrizations, weight_norm, spectral_norm and pruning go along; other hooks stay with `head`. Raises TypeError for anything but a head.
        """
        if not isinstance(head, InterflowHead):
            raise TypeError(f"head must be an InterflowHead, got {type(head).__name__}")
        return twin(head, cls)

    def to_eager(self) -> InterflowHead:
        """The plain PyTorch head with the parameters of this one: the same tensors, so both train together.

        What moves or casts one in place, such as .to(device), does so to the other: take copy.deepcopy(head).to_eager() for a head of its own.

        Parametrizations, weight_norm, spectral_norm and pruning go along; other hooks stay with this module.
        """
        return twin(self, InterflowHead)
