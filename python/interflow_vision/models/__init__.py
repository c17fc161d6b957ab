"""Networks with Interflow heads: VGG-16, how its stages end, its heads, and what makes it ready to serve."""

from .registry import create_model, list_models
from .vgg import VGG, vgg16, vgg16_bn

__all__ = ["VGG", "create_model", "list_models", "vgg16", "vgg16_bn"]
