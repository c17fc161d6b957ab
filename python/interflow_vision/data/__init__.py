"""Images: data sets, reading and preparing files, loaders that a resumed run continues."""

from .modules import Digits, ImageFolder

__all__ = ["Digits", "ImageFolder"]
