"""Images: data sets, reading and preparing files, loaders that a resumed run continues."""

from .huggingface import HuggingFace
from .known import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST
from .modules import Digits, ImageFolder
from .shards import WebDataset

__all__ = ["CIFAR10", "CIFAR100", "MNIST", "SVHN", "Digits", "FashionMNIST", "HuggingFace", "ImageFolder", "WebDataset"]
