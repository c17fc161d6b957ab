"""VGG-16 with Interflow heads, a trainer and reports. Importing this needs torch only; training needs the extra [train]."""

from .errors import UserError
from .models import VGG, create_model, list_models, vgg16, vgg16_bn

__all__ = ["VGG", "UserError", "create_model", "list_models", "vgg16", "vgg16_bn"]
