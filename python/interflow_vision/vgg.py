"""VGG-16 in stages: a table of widths and one class that records its stages while it is built."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from interflow_kernels import AuxiliaryHeads, InterflowHead

from .errors import require_torchvision
from .heads import create_head, pooled

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of the 13 convolutions; a max-pool follows each of the five blocks."""

STAGES = (4, 3, 3, 3)
"""Convolutions of each stage: the stages end after conv2_2, conv3_3, conv4_3 and conv5_3, where blocks of VGG end."""


class StageEnd(nn.Module):
    """The end of a block or stage: ReLU, and the max-pool where VGG has one.

        feature = relu(u);  next = max_pool2d(feature, 2, 2), or the feature itself

    Shapes: u [B, C, H, W] -> next [B, C, H // 2, W // 2] or [B, C, H, W], feature [B, C, H, W]. No parameters.
    """

    def __init__(self, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The last convolution's (or norm's) output -> the next layer's input, the stage's feature."""
        feature = F.relu(u, inplace=True)
        return (F.max_pool2d(feature, 2, 2) if self.max_pool else feature), feature

    def extra_repr(self) -> str:
        return f"max_pool={self.max_pool}"


class VGG(nn.Module):
    """VGG's 3x3 convolutions in n stages, whose features go to a head.

    The feature of a stage is taken after its last ReLU and before the max-pool that follows; Interflow has no pool5.
    The plain network, `head="last"`, has all five max-pools: global mean after pool5, one fully connected layer.
    Layers are named as torchvision names them (features.0, features.1, ...), whatever the split and the head, so
    weights of the trunk move freely between models of the same width.

    Args:
        widths: output channels of the convolutions, block by block.
        batch_norm: whether a batch norm follows each convolution.
        num_classes: K; 0 for no classifier: the model then returns the pooled features [B, D].
        head: "fused", "eager", "auxiliary", "concat" or "last", see heads.py.
        attention, attention_bias, hard_weights, pool_size: as InterflowHead.
        stages: number of convolutions in each stage; default (4, 3, 3, 3), for head="last" one stage of all.
        width: multiplier of all widths.
        in_channels: channels of the image.
        pool5: whether head="last" keeps the last max-pool.
        auxiliary_weight: of each auxiliary loss, for head="auxiliary".

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
        attention: str = "nxn",
        stages: Sequence[int] | None = None,
        width: float = 1.0,
        in_channels: int = 3,
        pool5: bool = True,
        pool_size: int | tuple[int, int] = 1,
        attention_bias: bool = False,
        hard_weights: Sequence[float] | None = None,
        auxiliary_weight: float = 0.3,
    ) -> None:
        super().__init__()
        convolutions = sum(map(len, widths))
        ends = set(accumulate(_split(stages or ((convolutions,) if head == "last" else STAGES), convolutions)))
        if not width > 0:
            raise ValueError(f"width must be greater than 0, got {width}")
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.batch_norm = batch_norm
        self.head_name = head
        self.features = nn.ModuleDict()
        self.feature_info: list[dict[str, Any]] = []  # as timm: num_chs, reduction, module of each stage

        index, count, channels, reduction = 0, 0, in_channels, 1
        for block in widths:
            for position, base in enumerate(block):
                count += 1
                previous, channels = channels, max(1, round(base * width))
                self.features[str(index)] = nn.Conv2d(previous, channels, 3, padding=1)
                if batch_norm:
                    index += 1
                    self.features[str(index)] = nn.BatchNorm2d(channels)
                index += 1
                pooled_here = position == len(block) - 1 and (count < convolutions or (head == "last" and pool5))
                if not pooled_here and count not in ends:
                    self.features[str(index)] = nn.ReLU(inplace=True)
                else:
                    self.features[str(index)] = StageEnd(pooled_here)
                if count in ends:
                    after_pool = pooled_here and count == convolutions
                    self.feature_info.append({"num_chs": channels, "reduction": reduction * (2 if after_pool else 1), "module": f"features.{index}"})
                reduction *= 2 if pooled_here else 1
                index += 1
            index += 1  # torchvision counts the max-pool, which is part of StageEnd here
        self.min_size = reduction
        self.pool_size = pool_size
        self._head_options: dict[str, Any] = {
            "attention": attention,
            "pool_size": pool_size,
            "attention_bias": attention_bias,
            "hard_weights": hard_weights,
            "auxiliary_weight": auxiliary_weight,
        }
        self.head = self._new_head()
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        return create_head(self.head_name, [info["num_chs"] for info in self.feature_info], self.num_classes, **self._head_options)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Image [B, in_channels, H, W] -> the feature of each stage, [B, C_i, H_i, W_i]; with pool5, the last one after it."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be images [B, {self.in_channels}, H, W], got shape {tuple(x.shape)}")
        if min(x.shape[2:]) < self.min_size:
            raise ValueError(f"x must be at least {self.min_size} x {self.min_size} pixels for this model's max-pools, got {x.shape[2]} x {x.shape[3]}")
        stage_modules = {info["module"].removeprefix("features.") for info in self.feature_info}
        features = []
        last = len(self.features) - 1
        for i, (name, layer) in enumerate(self.features.items()):
            if isinstance(layer, StageEnd):
                x, feature = layer(x)
                if name in stage_modules:
                    features.append(x if i == last else feature)
            else:
                x = layer(x)
        return features

    def forward_head(self, features: Sequence[Tensor], pre_logits: bool = False) -> Tensor:
        """Features of the stages -> logits [B, K]; with `pre_logits` (or no classifier) the pooled features that it weighs, [B, D]."""
        if pre_logits or self.num_classes == 0:
            return pooled(features[-1:] if self.head_name == "last" else features, self.pool_size)
        return self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, in_channels, H, W] -> logits [B, K]; "auxiliary" gives all branches [B, n, K] while training."""
        return self.forward_head(self.forward_features(x))

    @property
    def has_branches(self) -> bool:
        """Whether the head has a score for each stage, so that forward_branches works."""
        return isinstance(self.head, (InterflowHead, AuxiliaryHeads))

    def forward_branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image -> logits y [B, K] and branch scores Z [B, n, K]; ValueError for a head without branches."""
        if not isinstance(self.head, (InterflowHead, AuxiliaryHeads)):
            raise ValueError(f"head={self.head_name!r} with {self.num_classes} classes has no branches; 'fused', 'eager' and 'auxiliary' have")
        return self.head.forward_branches(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The head; nn.Identity where num_classes is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, attention: str | None = None) -> None:
        """A new head of the same kind for `num_classes` classes (0: none), on the trunk's device and in its dtype."""
        self.num_classes = num_classes
        if attention is not None:
            self._head_options["attention"] = attention
        weight = next(self.features.parameters())
        self.head = self._new_head().to(device=weight.device, dtype=weight.dtype).train(self.training)

    def load_torchvision_convolutions(self, state_dict: Mapping[str, Tensor]) -> None:
        """Takes the convolutions (and batch norms) from torchvision's VGG-16 of the same kind; its classifier is left out.

        Raises ValueError where the weights do not fit: width must be 1 and vgg16_bn wants torchvision's vgg16_bn.
        """
        given = {key.removeprefix("features."): value for key, value in state_dict.items() if key.startswith("features.")}
        own = self.features.state_dict()
        odd = sorted(set(given) ^ set(own), key=lambda key: int(key.split(".")[0]))
        if odd:
            what = "lack" if odd[0] in own else "have"
            kind = "vgg16_bn" if self.batch_norm else "vgg16"
            raise ValueError(f"torchvision's weights {what} features.{odd[0]}, unlike this model; it needs those of torchvision's {kind}")
        for key, value in own.items():
            if given[key].shape != value.shape:
                shapes = f"torchvision's features.{key} is {list(given[key].shape)}, this model's {list(value.shape)}"
                raise ValueError(f"{shapes}; pretrained weights need width=1 and in_channels=3")
        self.features.load_state_dict(given)

    def load_pretrained(self) -> None:
        """torchvision's ImageNet weights for the convolutions, downloaded by torchvision; MissingPackageError without it."""
        torchvision = require_torchvision("pretrained=True")
        name = "VGG16_BN_Weights" if self.batch_norm else "VGG16_Weights"
        self.load_torchvision_convolutions(torchvision.models.get_weight(f"{name}.IMAGENET1K_V1").get_state_dict(progress=True))


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


def _built(model: VGG, pretrained: bool) -> VGG:
    if pretrained:
        model.load_pretrained()
    return model
