"""timm and torchvision for the tests of this folder."""

import torchvision_operators

torchvision_operators.make_importable()
