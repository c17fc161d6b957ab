"""The network that `attach` gives: a backbone, the maps of its stages, and an Interflow head on them; methods as timm's models have them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from interflow_kernels import AuxiliaryHeads, InterflowHead, _fx

from ..models.heads import LastHead, create_head, pooled
from ..models.wrappers import unwrapped
from . import grouping, serving, unused
from .exchange import Exchange, Parcel
from .readers import Intermediates, Reader
from .stage import Stage


class InterflowNetwork(nn.Module):
    """A backbone with a head on the maps of its stages. Made by `attach`.

        x_i = the map of stage i,  logits = head([x_1, ..., x_n])

    Parameters lie below `backbone.`, under the names that the backbone gives them, and below `head.`.

    Args:
        backbone: the module.
        reader: how the maps are got from it.
        stages: name, channels, reduction and layout of each.
        num_classes: K; 0 for no classifier: the network then returns the pooled features [B, D].
        head: "fused", "eager", "auxiliary", "concat" or "last", see models/heads.py.
        head_options: attention, pool_size, and what else create_head takes.
        exchange: through which hooks and stage ends hand over maps and means.
        default_cfg: as timm's, at least "input_size".

    Shapes: image [B, C, H, W] -> logits [B, K]; "auxiliary" gives [B, n, K] while training.
    """

    def __init__(
        self,
        backbone: nn.Module,
        reader: Reader,
        stages: Sequence[Stage],
        num_classes: int,
        *,
        head: str,
        head_options: Mapping[str, Any],
        exchange: Exchange,
        default_cfg: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.stages = tuple(stages)
        self.num_classes = num_classes
        self.head_name = head
        self.default_cfg: dict[str, Any] = {**default_cfg, "num_classes": num_classes, "classifier": "head"}
        self.replaced: dict[str, str] = {}
        """Stage -> what of the backbone was replaced at its end, so that its mean comes with its map; filled by stage_ends.install."""
        self.fused_stages: frozenset[int] = frozenset()
        self._reader, self._exchange = reader, exchange
        self._head_options = dict(head_options)
        size = self._head_options.get("pool_size", 1)
        self.pool_size: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        self._frozen = 0
        self._asked_unused = False
        self._pretrained: Any = None  # () -> state_dict of the backbone, where a library has its weights
        self.head = self._new_head()

    # --- what timm's models have ----------------------------------------------------------------------------------------------
    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """num_chs, reduction and module of each stage."""
        return [stage.as_info() for stage in self.stages]

    @property
    def num_features(self) -> int:
        """D: the pooled values that the head weighs, of all stages together."""
        stages = self.stages[-1:] if self.head_name == "last" else self.stages
        return sum(stage.channels for stage in stages) * self.pool_size[0] * self.pool_size[1]

    @property
    def head_hidden_size(self) -> int:
        """What comes into the head's product: num_features."""
        return self.num_features

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """Image [B, C, H, W] -> the map of each stage [B, C_i, H_i, W_i]; of tokens [B, C_i, N, 1]. Views: nothing is copied."""
        return [stage.as_map(m) for stage, m in zip(self.stages, self._maps(x)[0], strict=True)]

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Image [B, C, H, W] -> what the head takes of each stage: the mean [B, C_i] where the stage's end gives it, else the map."""
        maps, parcel = self._maps(x)
        return [self._feature(i, m, parcel) for i, m in enumerate(maps)]

    def _maps(self, x: Tensor) -> tuple[list[Tensor], Parcel]:
        if not self.fused_stages:
            return self._counted(self._reader.maps(self.backbone, x)), {}
        parcel = self._exchange.open()
        try:
            maps = self._reader.maps(self.backbone, x)
        finally:
            self._exchange.close()
        return self._counted(maps), parcel

    def _counted(self, maps: list[Tensor]) -> list[Tensor]:
        if len(maps) != len(self.stages):
            raise ValueError(f"backbone must give {len(self.stages)} maps, as when it was attached, got {len(maps)}")
        return maps

    def _feature(self, i: int, m: Tensor, parcel: Parcel) -> Tensor:
        """The mean that came with this very map, unless somebody has written over the map since; else the map."""
        offered = parcel.get(("mean", i))
        if offered is not None and offered.map is m and offered.untouched():
            return offered.mean
        return self.stages[i].as_map(m)

    def forward_head(self, features: Sequence[Tensor], pre_logits: bool = False) -> Tensor:
        """Features of the stages -> logits [B, K]; with `pre_logits` (or no classifier) the pooled values that the head weighs, [B, D]."""
        head = unwrapped(self.head)
        without = isinstance(head, nn.Identity)
        if pre_logits or without:
            last = self.head_name == "last" if without else isinstance(head, LastHead)
            return pooled(features[-1:] if last else features, self.pool_size, self.dtype)
        return self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, C, H, W] -> logits [B, K]; "auxiliary" gives all branches [B, n, K] while training."""
        if isinstance(x, fx.Proxy):
            traced = self._as_leaf(x)
            if traced is not None:
                return traced
        features = self.forward_features(x)
        if not self._asked_unused and self.training:
            self._asked_unused = unused.warn_where_distributed(self.backbone, features)
        return self.forward_head(features)

    def _as_leaf(self, x: fx.Proxy) -> Any:
        """One node in the graph of a network around this one; None where this network itself is traced."""
        try:
            raise TypeError
        except TypeError:
            try:
                return _fx.leaf(self, x)
            except TypeError:
                return None

    def forward_branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image -> logits y [B, K] and branch scores Z [B, n, K]; ValueError for a head without branches."""
        head = unwrapped(self.head)
        if not isinstance(head, (InterflowHead, AuxiliaryHeads)):
            raise ValueError(f"the head, {type(head).__name__}, has no branches; InterflowHead, FusedInterflowHead and AuxiliaryHeads have")
        return head.forward_branches(self.forward_features(x))

    @property
    def has_branches(self) -> bool:
        """Whether the head has a score for each stage, so that forward_branches works."""
        return isinstance(unwrapped(self.head), (InterflowHead, AuxiliaryHeads))

    def get_classifier(self) -> nn.Module:
        """The head; nn.Identity where num_classes is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, attention: str | None = None) -> None:
        """A new head of the same kind for `num_classes` classes (0: none), on the backbone's device and in its dtype."""
        self.num_classes = self.default_cfg["num_classes"] = num_classes
        if attention is not None:
            self._head_options["attention"] = attention
        self.head = self._new_head().train(self.training)

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        made = create_head(self.head_name, [stage.channels for stage in self.stages], self.num_classes, **self._head_options)
        like = next(self.backbone.parameters(), None)
        return made if like is None else made.to(device=like.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the backbone's floating parameters."""
        return next((p.dtype for p in self.backbone.parameters() if p.is_floating_point()), torch.get_default_dtype())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Handed to the backbone; ValueError where it has no such method."""
        for module in (self.backbone, getattr(self.backbone, "model", None)):
            if hasattr(module, "set_grad_checkpointing"):
                module.set_grad_checkpointing(enable)  # type: ignore[operator, union-attr]
                return
        raise ValueError(f"the backbone, {type(self.backbone).__name__}, has no gradient checkpointing (set_grad_checkpointing)")

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: what the backbone says of its own, and the head's bias and attention."""
        return grouping.no_weight_decay(self)

    def group_matcher(self, coarse: bool = False) -> Any:
        """Parameter name -> group, ordered by depth: (0,) up to the first stage's end, ..., the head last; for timm's layer decay."""
        return grouping.matcher(self)

    # --- training and serving -------------------------------------------------------------------------------------------------
    def parameter_groups(self, lr: float, *, backbone_lr: float | None = None, layer_decay: float = 1.0, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups for an optimizer with a learning rate for each depth; see grouping.parameter_groups."""
        return grouping.parameter_groups(self, lr, backbone_lr=backbone_lr, layer_decay=layer_decay, weight_decay=weight_decay)

    def freeze(self, stages: int | None = None) -> None:
        """Freezes the first `stages` stages of the backbone (None: all of it): no gradients, and norms keep their statistics. 0 thaws it."""
        grouping.freeze(self, stages)

    def train(self, mode: bool = True) -> "InterflowNetwork":
        """As nn.Module.train; norms of frozen stages stay in eval mode."""
        super().train(mode)
        if mode and self.__dict__.get("_frozen"):
            grouping.keep_norms_still(self)
        return self

    def unused_parameters(self) -> list[str]:
        """Names of the backbone's parameters that its maps do not depend on, such as those of its own classifier."""
        return unused.names(self)

    def load_pretrained(self) -> None:
        """The library's pretrained weights for the backbone; ValueError where it was not built by its name."""
        if self._pretrained is None:
            raise ValueError("the backbone was not built by its name: give it its pretrained weights before attach")
        self.backbone.load_state_dict(self._pretrained())

    def for_inference(self, dtype: torch.dtype | None = None, channels_last: bool = True) -> "InterflowNetwork":
        """A new network to serve with: the head folded where it is linear, norms behind plain convolutions folded, frozen.

        Give images in `dtype`. Raises TypeError for a dtype that is not floating point.
        """
        return serving.for_inference(self, dtype, channels_last)

    @property
    def in_channels(self) -> int:
        """Channels of the image."""
        return int(self.default_cfg["input_size"][0])

    min_size = 1
    """Pixels a side that an image needs; a backbone that needs more refuses by itself."""

    @property
    def fixed_size(self) -> int | None:
        """The only number of pixels a side that the backbone takes, as a ViT does; None where it takes any."""
        return int(self.default_cfg["input_size"][-1]) if self.default_cfg.get("fixed_input_size") else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "InterflowNetwork":
        """A copy in the same modes: a graph of torchvision's with a code for each mode wakes up in training mode."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        for name, value in vars(self).items():
            vars(made)[name] = copy.deepcopy(value, memo)
        made.backbone.train(self.backbone.training)
        for module, original in zip(made.modules(), self.modules(), strict=True):
            module.training = original.training
        return made

    def extra_repr(self) -> str:
        parts = [f"stages=[{', '.join(stage.name for stage in self.stages)}]"]
        dropped = self.backbone.dropped if isinstance(self.backbone, Intermediates) else max(stage.skipped for stage in self.stages)
        if dropped:
            parts.append(f"class tokens left out of the means: {dropped}")
        if self.replaced:
            parts.append(f"fused ends: {'; '.join(f'{name}: {what}' for name, what in self.replaced.items())}")
        return ", ".join(parts)
