"""VGG-16 in stages: a table of widths, the layers it becomes, and the class that carries them with a head."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn

from interflow_kernels import AuxiliaryHeads, InterflowHead

from . import inference, pretrained
from .heads import LastHead, create_head, pooled
from .stages import STAGES as STAGE_ENDS
from .stages import make_stage_end
from .trunk import Place, Trunk
from .wrappers import unwrapped

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of the 13 convolutions; a max-pool follows each of the five blocks."""

STAGES = (4, 3, 3, 3)
"""Convolutions of each stage: the stages end after conv2_2, conv3_3, conv4_3 and conv5_3, where blocks of VGG end."""


class VGG(nn.Module):
    """VGG's 3x3 convolutions in n stages, whose features go to a head.

    The feature of a stage is taken after its last ReLU and before the max-pool that follows; Interflow has no pool5. With
    stage="fused" the feature is the map's mean, which the tap at the stage's end takes on its one pass over the map.
    The plain network, `head="last"`, has all five max-pools: global mean after pool5, one fully connected layer.
    Layers are named as torchvision names them (features.0, features.1, ...), whatever the split and the head, so
    weights of the trunk move freely between models of the same width.

    Args:
        widths: output channels of the convolutions, block by block.
        batch_norm: whether a batch norm follows each convolution.
        num_classes: K; 0 for no classifier: the model then returns the pooled features [B, D].
        head: "fused", "eager", "auxiliary", "concat" or "last", see heads.py.
        stage: "fused" ends blocks and stages in StageTap, "eager" in ReLU and max-pool; the same parameters, see stages.py.
        attention: as InterflowHead.
        attention_bias: as InterflowHead.
        hard_weights: as InterflowHead.
        pool_size: as InterflowHead.
        stages: number of convolutions in each stage; default (4, 3, 3, 3), for head="last" one stage of all.
        width: multiplier of all widths.
        in_channels: channels of the image.
        pool5: whether head="last" keeps the last max-pool.
        auxiliary_weight: of each auxiliary loss, for head="auxiliary".
        norm: as InterflowHead, for head="concat" and "last" too.
        branch_loss: as InterflowHead.

    Shapes: image [B, in_channels, H, W] -> logits [B, K]; "auxiliary" gives [B, n, K] while training. H and W must be at
    least `min_size`, 16 pixels, 32 with pool5. Source: Simonyan and Zisserman, arXiv 1409.1556; Z. Cai, arXiv 2106.14073.

    Raises ValueError, one sentence, on arguments or images that do not fit.
    """

    def __init__(
        self,
        widths: Sequence[Sequence[int]] = WIDTHS,
        *,
        batch_norm: bool = False,
        num_classes: int = 10,
        head: str = "fused",
        stage: str = "fused",
        attention: str = "nxn",
        stages: Sequence[int] | None = None,
        width: float = 1.0,
        in_channels: int = 3,
        pool5: bool = True,
        pool_size: int | tuple[int, int] = 1,
        attention_bias: bool = False,
        hard_weights: Sequence[float] | None = None,
        auxiliary_weight: float = 0.3,
        norm: str | None = None,
        branch_loss: float = 0.0,
    ) -> None:
        super().__init__()
        convolutions = sum(map(len, widths))
        ends = set(accumulate(_split(stages or ((convolutions,) if head == "last" else STAGES), convolutions)))
        if not width > 0:
            raise ValueError(f"width must be greater than 0, got {width}")
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        if stage not in STAGE_ENDS:
            raise ValueError(f"stage must be one of {', '.join(map(repr, STAGE_ENDS))}, got {stage!r}")
        self.num_classes = num_classes
        self.head_name = head
        self.pool_size = (pool_size, pool_size) if isinstance(pool_size, int) else (pool_size[0], pool_size[1])
        self._trunk_options: dict[str, Any] = {"widths": widths, "stage": stage, "stages": stages, "width": width, "in_channels": in_channels, "pool5": pool5}
        layers, self.feature_info, self.min_size = _layers(
            widths, ends, convolutions, stage, width, in_channels, batch_norm, head == "last" and pool5, self.pool_size
        )
        self._set_trunk(Trunk(layers))
        self._head_options: dict[str, Any] = {
            "attention": attention,
            "pool_size": pool_size,
            "attention_bias": attention_bias,
            "hard_weights": hard_weights,
            "auxiliary_weight": auxiliary_weight,
            "norm": norm,
            "branch_loss": branch_loss,
        }
        self.head = self._new_head()
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def _set_trunk(self, trunk: Trunk) -> None:
        self.features = trunk
        names = [name for name, place in trunk.places.items() if place.feature]
        self.feature_info = [{**info, "module": f"features.{name}"} for info, name in zip(self.feature_info, names, strict=True)]

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        return create_head(self.head_name, [info["num_chs"] for info in self.feature_info], self.num_classes, **self._head_options)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Image [B, in_channels, H, W] -> what the head takes of each stage: with stage="fused" the mean [B, C_i], else the map.

        Maps are [B, C_i, H_i, W_i]; with pool5 the last feature is the map after it, either way. See forward_maps.
        """
        self._check_image(x)
        return self.features(x)

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """Image [B, in_channels, H, W] -> the feature map of each stage [B, C_i, H_i, W_i], whatever its end; with pool5 the last one after it."""
        self._check_image(x)
        return self.features(x, maps=True)

    def _check_image(self, x: Tensor) -> None:
        if isinstance(x, fx.Proxy):
            return
        channels = self._first_channels()
        if x.dim() != 4 or (channels is not None and x.shape[1] != channels):
            raise ValueError(f"x must be images [B, {'C' if channels is None else channels}, H, W], got shape {tuple(x.shape)}")
        if min(x.shape[2:]) < self.min_size:
            raise ValueError(f"x must be at least {self.min_size} x {self.min_size} pixels for this model's max-pools, got {x.shape[2]} x {x.shape[3]}")

    def _first_channels(self) -> int | None:
        """What the first layer takes; None where it is not a convolution, wrapped or not, that tells."""
        first = unwrapped(next(iter(self.features.values())))
        return first.in_channels if isinstance(first, nn.Conv2d) else None

    def forward_head(self, features: Sequence[Tensor], pre_logits: bool = False) -> Tensor:
        """Features of the stages -> logits [B, K]; with `pre_logits` (or no classifier) the pooled features that it weighs, [B, D]."""
        head = unwrapped(self.head)
        without = isinstance(head, nn.Identity)
        if pre_logits or without:
            last = self.head_name == "last" if without else isinstance(head, LastHead)
            return pooled(features[-1:] if last else features, self.pool_size, self.dtype)
        return self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, in_channels, H, W] -> logits [B, K]; "auxiliary" gives all branches [B, n, K] while training."""
        return self.forward_head(self.forward_features(x))

    @property
    def dtype(self) -> torch.dtype:
        """Of the convolutions' parameters."""
        return next(self.features.parameters()).dtype

    @property
    def in_channels(self) -> int:
        """Channels of the image: those of the first convolution as it is now, of the one it was built with where another layer stands there."""
        channels = self._first_channels()
        return self._trunk_options["in_channels"] if channels is None else channels

    @property
    def batch_norm(self) -> bool:
        """Whether norms follow the convolutions."""
        return any(place.role == "norm" for place in self.features.places.values())

    @property
    def has_branches(self) -> bool:
        """Whether the head has a score for each stage, so that forward_branches works; a head in the wrappers that `unwrapped` knows counts."""
        return isinstance(unwrapped(self.head), (InterflowHead, AuxiliaryHeads))

    def forward_branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image -> logits y [B, K] and branch scores Z [B, n, K]; ValueError for a head without branches."""
        head = unwrapped(self.head)
        if not isinstance(head, (InterflowHead, AuxiliaryHeads)):
            raise ValueError(f"the head, {type(head).__name__}, has no branches; InterflowHead, FusedInterflowHead and AuxiliaryHeads have")
        return head.forward_branches(self.forward_features(x))

    def rebuilt(self, **changes: Any) -> "VGG":
        """A new network as this one was built, but for `changes`: options of VGG. Its weights are new."""
        now = {"in_channels": self.in_channels, "batch_norm": self.batch_norm, "num_classes": self.num_classes, "head": self.head_name}
        return VGG(**{**self._trunk_options, **self._head_options, **now, **changes})

    def fuse(self) -> "VGG":
        """A new network in eval mode whose norms are folded into the convolutions before them; this one stays as it is.

        Folded is what the layers are now: BatchNorm2d and SyncBatchNorm with running statistics, behind an nn.Conv2d,
        parametrized, pruned, or inside torch.compile or checkpoint_wrapper too. Other norms, and modules with hooks or
        with parameters that are not plain tensors, stay as they are; one warning names them.
        """
        fused, stays = self._fused()
        inference.say_what_stays("fuse", stays)
        return fused

    def _fused(self) -> tuple["VGG", list[str]]:
        fused = inference.copied(self).eval()
        trunk, stays = inference.without_norms(fused.features)
        fused._set_trunk(trunk)
        return fused, stays

    def for_inference(self, dtype: torch.dtype | None = None, channels_last: bool = True) -> "VGG":
        """A new network to serve with: `fuse`, the head folded where it is linear, frozen, in `dtype` and one memory format.

        Give images in `dtype`; their memory format does not matter. Raises TypeError for a dtype that is not floating point.
        """
        ready, stays = self._fused()
        ready.head, why = inference.folded_head(ready.head)
        inference.say_what_stays("for_inference", stays + why)
        inference.freeze(ready, dtype, channels_last)
        return ready

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone beside those of one dimension: of an Interflow head, all but `weight`."""
        heads = [module for module in self.modules() if isinstance(module, InterflowHead)]
        left = {id(p) for head in heads for name, p in head.named_parameters() if name in head.no_weight_decay()}
        return {name for name, p in self.named_parameters() if id(p) in left}

    def get_classifier(self) -> nn.Module:
        """The head; nn.Identity where num_classes is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, attention: str | None = None) -> None:
        """A new head of the same kind for `num_classes` classes (0: none), on the trunk's device and in its dtype."""
        self.num_classes = num_classes
        if attention is not None:
            self._head_options["attention"] = attention
        self.head = self._new_head().to(device=next(self.features.parameters()).device, dtype=self.dtype).train(self.training)

    def load_torchvision_convolutions(self, state_dict: Mapping[str, Tensor]) -> None:
        """Takes the convolutions (and batch norms) from torchvision's VGG-16 of the same kind; its classifier is left out.

        Raises ValueError where the weights do not fit: width must be 1 and vgg16_bn wants torchvision's vgg16_bn.
        """
        pretrained.take_torchvision_weights(self.features, self.batch_norm, state_dict)

    def load_pretrained(self) -> None:
        """torchvision's ImageNet weights for the convolutions, downloaded by torchvision; MissingPackageError without it."""
        self.load_torchvision_convolutions(pretrained.imagenet_weights(self.batch_norm))


def _layers(
    widths: Sequence[Sequence[int]],
    ends: set[int],
    convolutions: int,
    stage: str,
    width: float,
    in_channels: int,
    batch_norm: bool,
    last_pool: bool,
    pool_size: tuple[int, int],
) -> tuple[list[tuple[Place, nn.Module]], list[dict[str, Any]], int]:
    """The trunk's layers in order, feature_info of its stages (as timm: num_chs, reduction), and the smallest side of an image.

    ends: after which convolutions a stage ends; last_pool: whether a max-pool follows the last one.
    """
    feature_info: list[dict[str, Any]] = []
    layers: list[tuple[Place, nn.Module]] = []
    count, channels, reduction = 0, in_channels, 1
    for block in widths:
        for position, base in enumerate(block):
            count += 1
            previous, channels = channels, max(1, round(base * width))
            last = count == convolutions
            max_pool = position == len(block) - 1 and (not last or last_pool)
            layers.append((Place("convolution"), nn.Conv2d(previous, channels, 3, padding=1)))
            if batch_norm:
                layers.append((Place("norm"), nn.BatchNorm2d(channels)))
            if max_pool or count in ends:
                layers.append((Place("end", max_pool, count in ends), make_stage_end(stage, max_pool, count in ends, last, pool_size)))
            else:
                layers.append((Place("relu"), nn.ReLU()))
            if count in ends:
                feature_info.append({"num_chs": channels, "reduction": reduction * (2 if max_pool and last else 1)})
            reduction *= 2 if max_pool else 1
    return layers, feature_info, reduction


def _split(stages: Sequence[int], convolutions: int) -> tuple[int, ...]:
    """The split, checked: 1 to 16 stages of at least one convolution each, all convolutions in total."""
    split = tuple(stages)
    if not 1 <= len(split) <= 16 or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in split) or sum(split) != convolutions:
        raise ValueError(f"stages must be 1 to 16 whole numbers of at least 1 whose sum is the {convolutions} convolutions, got {split}")
    return split


def vgg16(*, pretrained: bool = False, **options: Any) -> VGG:
    """VGG-16 without batch norm. `options`: those of VGG. `pretrained`: torchvision's ImageNet convolutions."""
    return _built(VGG(batch_norm=False, **options), pretrained)


def vgg16_bn(*, pretrained: bool = False, **options: Any) -> VGG:
    """VGG-16 with batch norm. `options`: those of VGG. `pretrained`: torchvision's ImageNet convolutions and norms."""
    return _built(VGG(batch_norm=True, **options), pretrained)


def plain(convolutions: int, *, pretrained: bool = False, **options: Any) -> VGG:
    """A network of `convolutions` 3x3 convolutions without norms, in VGG-16's five blocks: 2 : 2 : 3 : 3 : 3 of them, the largest remainders rounded up.

    `options`: those of VGG; stages default to the blocks' ends, as VGG-16's do. For asking what depth alone does. Raises ValueError for fewer than
    5 convolutions, and for pretrained=True, of which there are no weights.
    """
    blocks = _in_proportion(convolutions, [len(block) for block in WIDTHS])
    if pretrained:
        raise ValueError(f"pretrained must be False for plain{convolutions}, for which there are no weights")
    widths = [(block[0],) * count for block, count in zip(WIDTHS, blocks, strict=True)]
    if options.get("stages") is None and options.get("head") != "last":
        options["stages"] = (blocks[0] + blocks[1], *blocks[2:])
    return VGG(widths, batch_norm=False, **options)


def _in_proportion(total: int, shares: Sequence[int]) -> list[int]:
    """`total` as whole numbers in the proportion of `shares`, each at least 1; what rounding down leaves goes to the largest remainders."""
    if total < len(shares):
        raise ValueError(f"a plain network must have at least {len(shares)} convolutions, one for each block, got {total}")
    exact = [total * share / sum(shares) for share in shares]
    parts = [max(1, int(value)) for value in exact]
    order = sorted(range(len(parts)), key=lambda i: int(exact[i]) - exact[i])
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    parts[-1] -= sum(parts) - total  # where a block of less than one convolution was rounded up
    return parts


def _built(model: VGG, with_weights: bool) -> VGG:
    if with_weights:
        model.load_pretrained()
    return model
