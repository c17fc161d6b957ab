"""Where the Triton kernels serve the raw operators: on a GPU's key that no compiled library holds, and wherever they are asked for.

Triton itself is imported by the first call, so the package imports without it. `reason_against(device)` says why they do not
run there. With TRITON_INTERPRET=1 they run on the CPU too, on request: slow, for tests.
"""

import functools
import importlib.util
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import _native
from .._namespace import NAMESPACE

# As in csrc/library.cpp, for machines where nothing was compiled.
SCHEMAS = (
    "interflow_head(Tensor[] features, Tensor weight, Tensor? bias, Tensor? attention_weight, Tensor? attention_bias, "
    "str attention, int[2] pool_size, bool need_branches, ScalarType? dtype) -> (Tensor y, Tensor branches, Tensor pooled)",
    "interflow_head_backward(Tensor? dy, Tensor? dbranches, Tensor pooled, Tensor weight, Tensor? bias, "
    "Tensor? attention_weight, Tensor? attention_bias, str attention, int[] widths, int[] feature_stages, "
    "bool need_weight, bool need_bias, bool need_attention) "
    "-> (Tensor dpooled, Tensor dweight, Tensor dbias, Tensor dattention_weight, Tensor dattention_bias)",
    "interflow_pool(Tensor[] features, int[2] pool_size) -> Tensor",
    "stage_tap(Tensor u, Tensor? shift, bool max_pool, bool need_mask) -> (Tensor m, Tensor p, Tensor mask)",
    "stage_tap_backward(Tensor? dm, Tensor? dp, Tensor mask, Tensor like, bool max_pool, bool channels_last, bool need_shift) -> (Tensor du, Tensor dshift)",
    "stage_end(Tensor u, Tensor? shift, Tensor? residual, str activation) -> (Tensor v, Tensor p)",
    "stage_end_backward(Tensor? dv, Tensor? dp, Tensor? v, Tensor like, bool channels_last, bool need_shift) -> (Tensor du, Tensor dshift)",
)
_KEYS = {"cuda": "CUDA", "xpu": "XPU", "cpu": "CPU"}
_libraries: list[torch.library.Library] = []  # kept alive: their registrations end with them
_forced: list[torch.library.Library] = []
_routed: dict[str, torch.library.Library] = {}
_without_code: set[torch.device] = set()


def _missing() -> str | None:
    """What this machine lacks for Triton, and the remedy; None where it lacks nothing."""
    if _native.taken is not None:
        return _native.taken
    if _native.torch_version() < _native.MINIMUM_TORCH:
        return f"the kernels need torch >= 2.10, this is torch {torch.__version__}; upgrade torch"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if os.environ.get("CC") is None and not any(map(shutil.which, ("gcc", "clang"))):
        return "Triton needs a C compiler to launch its kernels and finds none; install gcc, or name one in the environment variable CC"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Triton needs Python's C headers to launch its kernels; install them (Debian: apt install python3-dev)"
    return None


def _reason(device: str) -> str | None:
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton serves GPUs; on the CPU its interpreter runs where TRITON_INTERPRET=1 is set before the start"
    return _missing()


REASONS: dict[str, str | None] = {device: _reason(device) for device in _KEYS}
"""By device type: None where the kernels run, else cause and remedy in one sentence. Found once: torch.compile reads it while it traces."""


def reason_against(device: str) -> str | None:
    """None where the Triton kernels run on `device` ("cuda", "xpu", ...), else cause and remedy in one sentence."""
    return REASONS.get(device, f"Triton does not serve device {device!r}; ask for 'native' or 'eager'")


def native_serves(device: str) -> bool:
    """Whether a compiled library holds the operators' key of `device`."""
    error = {"cpu": _native.cpu_error, "cuda": getattr(_native, "cuda_error", "")}.get(device, "")
    return error is None


def schemas_exist() -> bool:
    """Whether the operators exist: defined by the compiled library, or here for Triton alone."""
    return _native.cpu_error is None or bool(_libraries)


# --- the operators, imported when first called ----------------------------------------------------------------------------
@functools.cache
def _loaded(module: str, device: str) -> Any:
    reason = reason_against(device)
    if reason is not None:
        raise RuntimeError(f"the Triton kernels cannot run on device {device!r}: {reason}")
    return importlib.import_module(f".{module}", __package__)


def interflow_head(features: Any, weight: Any, *rest: Any) -> Any:
    return _loaded("interflow_head.forward", weight.device.type).interflow_head(features, weight, *rest)


def interflow_head_backward(dy: Any, dbranches: Any, pooled: Any, *rest: Any) -> Any:
    return _loaded("interflow_head.backward", pooled.device.type).interflow_head_backward(dy, dbranches, pooled, *rest)


def interflow_pool(features: Any, *rest: Any) -> Any:
    return _loaded("interflow_head.pool", features[0].device.type).interflow_pool(features, *rest)


def stage_tap(u: Any, *rest: Any) -> Any:
    return _loaded("stage_tap.forward", u.device.type).stage_tap(u, *rest)


def stage_tap_backward(dm: Any, dp: Any, mask: Any, *rest: Any) -> Any:
    return _loaded("stage_tap.backward", mask.device.type).stage_tap_backward(dm, dp, mask, *rest)


def stage_end(u: Any, *rest: Any) -> Any:
    return _loaded("stage_end.forward", u.device.type).stage_end(u, *rest)


def stage_end_backward(dv: Any, dp: Any, v: Any, like: Any, *rest: Any) -> Any:
    return _loaded("stage_end.backward", like.device.type).stage_end_backward(dv, dp, v, like, *rest)


# Each with the place of the argument that tells the device, itself or the first of its tensors.
_OPERATORS: dict[Callable[..., Any], int] = {
    interflow_head: 1,
    interflow_head_backward: 2,
    interflow_pool: 0,
    stage_tap: 0,
    stage_tap_backward: 2,
    stage_end: 0,
    stage_end_backward: 3,
}


def _registered(devices: list[str]) -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "IMPL")
    for device in devices:
        for operator in _OPERATORS:
            library.impl(operator.__name__, operator, _KEYS[device])
    return library


# --- registration -----------------------------------------------------------------------------------------------------------
def install() -> None:
    """Takes the GPU keys that no compiled library holds; defines the schemas where nothing compiled did and Triton could run."""
    if _libraries:
        return
    free = [device for device in _KEYS if not native_serves(device) and (device != "cpu" or REASONS["cpu"] is None)]
    if _native.cpu_error is not None:
        if all(reason is not None for reason in REASONS.values()):
            return
        library = torch.library.Library(NAMESPACE, "FRAGMENT")
        for schema in SCHEMAS:
            library.define(schema)
        _libraries.append(library)
    _libraries.append(_registered(free))


def force(wanted: bool) -> None:
    """Puts Triton in front of compiled kernels, on every device where it runs, or takes it away again."""
    if wanted == bool(_forced) or not schemas_exist():
        return
    if not wanted:
        library = _forced.pop()
        library._destroy()  # the compiled kernels come back
        return
    held = [device for device in _KEYS if reason_against(device) is None and native_serves(device)]
    with _overriding():
        _forced.append(_registered(held))


@contextmanager
def _overriding() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*(Overriding a previously registered kernel|Warning only once for all operators)")
        yield


def serve(kind: str, index: int | None) -> None:
    """For a GPU where Triton was chosen although a compiled library holds its key: the library has no code for it. Other GPUs stay with the library."""
    device = torch.device(kind) if index is None else torch.device(kind, index)
    if device in _without_code or not native_serves(kind):
        return
    _without_code.add(device)
    if device.type in _routed:
        return
    if not hasattr(torch.library, "get_kernel"):  # an older torch: Triton for all of them
        force(True)
        return
    library = torch.library.Library(NAMESPACE, "IMPL")
    with _overriding():
        for operator, place in _OPERATORS.items():
            compiled = torch.library.get_kernel(f"{NAMESPACE}::{operator.__name__}", _KEYS[device.type])
            library.impl(operator.__name__, _by_device(operator, place, compiled), _KEYS[device.type], with_keyset=True)
    _routed[device.type] = library


serve._dynamo_marked_constant = True  # type: ignore[attr-defined]  # done while torch.compile traces, as what it traces then calls the operator


def _by_device(operator: Callable[..., Any], place: int, compiled: Any) -> Callable[..., Any]:
    def kernel(keys: Any, *arguments: Any) -> Any:
        told = arguments[place]
        if (told[0] if isinstance(told, (list, tuple)) else told).device in _without_code:
            return operator(*arguments)
        return compiled.call_boxed(keys, *arguments)

    return kernel
