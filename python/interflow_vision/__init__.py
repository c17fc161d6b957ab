"""Any backbone with an Interflow head, VGG-16 in stages, a trainer and reports. Importing this needs torch only; training needs the extra [train]."""

from .backbones import InterflowNetwork, attach, register_timm_models
from .errors import UserError
from .models import VGG, create_model, list_models, vgg16, vgg16_bn

__all__ = ["VGG", "InterflowNetwork", "UserError", "attach", "create_model", "list_models", "register_timm_models", "vgg16", "vgg16_bn"]
