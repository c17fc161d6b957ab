"""What a raw operator does before its registered autograd: refuses forward mode in a sentence, and becomes plain operators for ONNX.

torch.library's autograd of an operator knows no forward mode: it would lose the tangents in silence, as zeros. And torch.onnx offers no
place to register translations: `custom_translation_table` is an argument of each export. But the exporter traces once more what it is
given, programs of torch.export.export too, and calls every operator on the way; the table is in _onnx.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _onnx
from .._namespace import NAMESPACE
from ._library import library


def _has_tangent(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_tangent, value))
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


class _Front:
    """Stands for the library where torch.library.register_autograd puts its kernel: puts it behind these questions."""

    def __init__(self, name: str, sentence: str) -> None:
        self.ns = NAMESPACE
        self._sentence, self._translation = sentence, _onnx.TRANSLATIONS.get(name)

    def impl(self, name: str, usual: Callable[..., Any], key: str, **options: Any) -> None:
        sentence, translation = self._sentence, self._translation

        def kernel(keys: Any, *arguments: Any, **more: Any) -> Any:
            if forward_ad._current_level >= 0 and _has_tangent(arguments):
                raise NotImplementedError(sentence)
            if translation is not None and torch.onnx.is_in_onnx_export():
                return translation(*arguments)
            return usual(keys, *arguments, **more)

        library.impl(name, kernel, key, **options)


def register_autograd(name: str, backward: Callable[..., Any], forward_mode: str, setup_context: Callable[..., Any] | None = None) -> None:
    """torch.library.register_autograd for an operator of ours. forward_mode: the sentence that a differentiation in forward mode is answered."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_Front(name, forward_mode))
