"""The operators, and the library object that keeps what Python registers for them."""

import torch

from .._namespace import NAMESPACE

library = torch.library.Library(NAMESPACE, "FRAGMENT")
OPERATORS = getattr(torch.ops, NAMESPACE)
