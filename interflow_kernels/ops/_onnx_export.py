"""Raw operators while torch.onnx.export runs: a call records plain operators instead, by the table in _onnx.py.

torch offers no place to register such a table: `custom_translation_table` is an argument of each export. But the exporter traces once more
what it is given, programs of torch.export.export too, and calls every operator on the way. So the operators' autograd kernels, which come
first in that call, answer with the translation. They are put in front when the exporter is imported, so nobody else pays for it.
"""

from collections.abc import Callable
from typing import Any

import torch

from .. import _onnx
from .._namespace import NAMESPACE
from .._on_import import when_imported
from ._wiring import library

_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradXPU")


def _translating(translation: Callable[..., Any], usual: Any) -> Callable[..., Any]:
    def kernel(keys: Any, *arguments: Any) -> Any:
        return translation(*arguments) if torch.onnx.is_in_onnx_export() else usual.call_boxed(keys, *arguments)

    return kernel


def _install() -> None:
    if not hasattr(torch.library, "get_kernel"):  # an older torch: modules are exported all the same, programs with raw operators are not
        return
    for name, translation in _onnx.TRANSLATIONS.items():
        for key in _KEYS:
            usual = torch.library.get_kernel(f"{NAMESPACE}::{name}", key)
            library.impl(name, _translating(translation, usual), key, with_keyset=True)


when_imported("torch.onnx._internal.exporter", _install)
