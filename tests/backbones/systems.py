"""Every system that Interflow's description names, at a size that a test can pay for: how it is built, its stages and its images."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interflow_vision import create_model


@dataclass(frozen=True)
class System:
    """build: a new backbone; images: [B, C, side, side]; options: of attach; ends: how many stages end in a fused ReLU."""

    build: Callable[[], Any]
    side: int = 64
    batch: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    ends: int = 0


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, features_only=True, **options)


def torchvision_model(name: str, **options: Any) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, **options)


class OurVGG(nn.Module):
    """VGG-16 of this package as a backbone that returns its maps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = create_model("vgg16_bn", width=1 / 16, stage="eager", num_classes=0)
        self.feature_info = self.net.feature_info

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.net.forward_maps(x)


def narrow_vgg() -> nn.Module:
    """torchvision's VGG-16 at an eighth of its width: its class and layers. Its classifier, which is cut off anyway, takes no memory."""
    from torchvision.models.vgg import VGG, cfgs, make_layers

    with torch.device("meta"):
        net = VGG(nn.Identity(), init_weights=False)
    net.features = make_layers([c if c == "M" else c // 8 for c in cfgs["D"]])
    return net


def narrow_timm_vgg() -> nn.Module:
    """timm's VGG-16 with batch norm at an eighth of its width, as a model that classifies."""
    from timm.models.vgg import VGG, cfgs

    return VGG([c if c == "M" else c // 8 for c in cfgs["vgg16"]], num_classes=0, mlp_ratio=1 / 64, norm_layer=nn.BatchNorm2d)


def ssd_base() -> nn.Module:
    """The VGG-16 base of SSD with its six maps: torchvision's class and forward, its convolutions at an eighth of their widths, which it fixes."""
    from torchvision.models.detection.ssd import SSDFeatureExtractorVGG
    from torchvision.models.vgg import cfgs, make_layers

    with torch.device("meta"):
        base = SSDFeatureExtractorVGG(make_layers(cfgs["D"]), highres=False)
    for module in list(base.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d):
                a, b = max(3, child.in_channels // 8), child.out_channels // 8
                setattr(module, name, nn.Conv2d(a, b, child.kernel_size, child.stride, child.padding, child.dilation))
    base.scale_weight = nn.Parameter(torch.full((64,), 20.0))
    return base


def shallow_resnet() -> nn.Module:
    """torchvision's ResNet with one block a stage."""
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=16)


def fpn() -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d)


class DSSDPyramid(nn.Module):
    """A top-down way as DSSD fuses: the deeper map through a deconvolution, times the shallower one through a convolution."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 32), out: int = 12) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in zip((3, *widths), widths, strict=False))
        self.side = nn.ModuleList(nn.Sequential(nn.Conv2d(w, out, 3, padding=1), nn.BatchNorm2d(out)) for w in widths)
        self.up = nn.ModuleList(nn.Sequential(nn.ConvTranspose2d(out, out, 2, 2), nn.BatchNorm2d(out)) for _ in widths[1:])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = []
        for stage in self.down:
            x = stage(x)
            maps.append(x)
        top = F.relu(self.side[-1](maps[-1]))
        found = [top]
        for i in reversed(range(len(maps) - 1)):
            top = F.relu(self.up[i](top) * self.side[i](maps[i]))
            found.append(top)
        return {f"p{len(maps) - i}": m for i, m in enumerate(found)}


SHALLOW = {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48)}
SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "drop_path_rate": 0.0}
VIT = {"img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 2}

SYSTEMS = {
    "VGG-16, ours": System(OurVGG),
    "VGG-16, torchvision": System(narrow_vgg, ends=4),
    "VGG-16, timm": System(narrow_timm_vgg, ends=4),
    "GoogLeNet": System(lambda: torchvision_model("googlenet", init_weights=False, aux_logits=True), ends=1),
    "SE-ResNet": System(lambda: timm_model("seresnet18", **SHALLOW), ends=4),
    "CBAM": System(lambda: timm_model("resnet18", block_args={"attn_layer": "cbam"}, **SHALLOW), ends=4),
    "ResNet, timm": System(lambda: timm_model("resnet18", **SHALLOW), ends=4),
    "ResNet, torchvision": System(shallow_resnet, ends=4),
    "DenseNet": System(lambda: timm_model("densenet121", growth_rate=8, block_config=(2, 2, 2, 2)), ends=1),
    "DenseNet, torchvision": System(lambda: __import__("torchvision").models.DenseNet(growth_rate=8, block_config=(2, 2, 2, 2), num_init_features=16), ends=1),
    "ConvNeXt": System(lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))),
    "Swin": System(lambda: timm_model("swin_tiny_patch4_window7_224", **SWIN)),
    "ViT": System(lambda: "vit_tiny_patch16_224", options=VIT),
    "SSD's VGG-16 base": System(ssd_base, side=268, batch=2, ends=5, options={"input_size": 268, "stages": [0, 1, 2, 3, 4, 5]}),
    "FPN": System(fpn),
    "DSSD's pyramid": System(DSSDPyramid, options={"stages": [2, 1, 0]}),
}


def images(system: System, channels_last: bool) -> Tensor:
    x = torch.randn(system.batch, 3, system.side, system.side, generator=torch.Generator().manual_seed(1))
    return x.to(memory_format=torch.channels_last) if channels_last else x
