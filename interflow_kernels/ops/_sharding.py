"""The operators on DTensors: which shards of their arguments give which shards of their results. Nothing here computes.

Over each dimension of the mesh a call is of one kind:

    by image   images (features, u, pooled, upstream gradients) split, parameters whole: results split likewise, gradients of parameters are
               sums over the shards (Partial)
    by class   rows of weight [K, D] split, whatever has K in its shape split along it, features whole; the gradients of features and of
               parameters without K are sums over the shards. No class needs another's score, so every attention mode is split so.
    whole      nothing split

By image where an argument with images is split along them, else by class where the weight's rows are, else whole. Arguments that lie
otherwise are redistributed. Two kinds of tensors in one call, plain ones and DTensors, are refused in a sentence.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._on_import import when_imported
from ._library import OPERATORS

# By operator, then by kind: a letter for each tensor. A number is the dimension that is split, "+" a sum over shards, "-" whole.
_ARGUMENTS: dict[str, dict[str, dict[str, str]]] = {
    "interflow_head": {
        "image": {"features": "0"},
        "class": {"weight": "0", "bias": "1"},
    },
    "interflow_head_backward": {
        "image": {"dy": "0", "dbranches": "0", "pooled": "0"},
        "class": {"dy": "1", "dbranches": "2", "weight": "0", "bias": "1"},
    },
    "interflow_pool": {"image": {"features": "0"}},
    "stage_tap": {"image": {"u": "0"}},
    "stage_tap_backward": {"image": {"dm": "0", "dp": "0", "mask": "0", "like": "0"}},
    "stage_end": {"image": {"u": "0", "residual": "0"}},
    "stage_end_backward": {"image": {"dv": "0", "dp": "0", "v": "0", "like": "0"}},
}
_RESULTS: dict[str, dict[str, str]] = {
    "interflow_head": {"image": "000", "class": "12-"},  # y, branches, pooled
    "interflow_head_backward": {"image": "0++++", "class": "+01++"},  # dpooled, dweight, dbias, dattention_weight, dattention_bias
    "interflow_pool": {"image": "0"},  # pooled
    "stage_tap": {"image": "000"},  # m, p, mask
    "stage_tap_backward": {"image": "0+"},  # du, dshift
    "stage_end": {"image": "00"},  # v, p
    "stage_end_backward": {"image": "0+"},  # du, dshift
}
_ONLY_SHAPED = {"stage_tap_backward": ("dm", "dp"), "stage_end_backward": ("dv", "dp")}
"""Operators whose argument `like` only carries a shape and may be a plain tensor; which arguments tell how many images there are."""
_BY_CLASS = {"classwise": {"attention_weight": "1", "attention_bias": "0"}, "folded": {"attention_bias": "0"}}
"""Attention parameters with a value for each class, by mode."""


def _placement(letter: str) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    return Partial() if letter == "+" else Replicate() if letter == "-" else Shard(int(letter))


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, Tensor)]


def _kind(operator: str, given: dict[str, Any], axis: int) -> str:
    """How the call is split over one dimension of the mesh: "image", "class" or "whole"."""
    kinds = _ARGUMENTS[operator]
    for name in kinds["image"]:
        if any(getattr(getattr(t, "placements", {axis: None})[axis], "dim", None) == 0 for t in _tensors(given[name])):
            return "image"
    return "class" if "class" in kinds and getattr(given["weight"].placements[axis], "dim", None) == 0 else "whole"


def _letters(operator: str, attention: str, kind: str) -> tuple[dict[str, str], str]:
    """Of arguments by name (those not named are whole), and of results."""
    if kind == "whole":
        return {}, "-" * len(next(iter(_RESULTS[operator].values())))
    arguments, results = _ARGUMENTS[operator][kind], _RESULTS[operator][kind]
    if kind == "class":
        mode = _BY_CLASS.get(attention, {})
        arguments = {**arguments, **mode}
        if operator == "interflow_head_backward":
            results = results[:3] + mode.get("attention_weight", "+") + mode.get("attention_bias", "+")
    return arguments, results


def _mesh(operator: str, given: dict[str, Any]) -> Any:
    """The device mesh of all tensors; RuntimeError with a sentence where they have none, or several."""
    tensors = {name: _tensors(value) for name, value in given.items() if not (operator in _ONLY_SHAPED and name == "like")}
    plain = [name for name, each in tensors.items() if any(not hasattr(t, "device_mesh") for t in each)]
    if plain:
        raise RuntimeError(
            f"{operator}: {plain[0]} must be a DTensor where other tensors are, got a plain one; torch.distributed.tensor.distribute_tensor makes one of it"
        )
    meshes = {t.device_mesh for each in tensors.values() for t in each}  # type: ignore[attr-defined]
    if len(meshes) > 1:
        raise RuntimeError(f"{operator}: all DTensors must be on one device mesh, got {len(meshes)}")
    return meshes.pop()


def _on_meta(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_on_meta(v) for v in value]
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


def _rule(operator: str) -> Callable[..., Any]:
    names = [argument.name for argument in getattr(OPERATORS, operator).default._schema.arguments]

    def rule(_class: Any, function: Any, _types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        from torch.distributed.tensor import DTensor

        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        mesh = _mesh(operator, given)
        kinds = [_kind(operator, given, axis) for axis in range(mesh.ndim)]
        letters = [_letters(operator, given.get("attention", ""), kind) for kind in kinds]

        def local(name: str, value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [local(name, v) for v in value]
            if not isinstance(value, DTensor):
                return value
            return value.redistribute(mesh, [_placement(arguments.get(name, "-")) for arguments, _ in letters]).to_local()

        mine = {name: local(name, value) for name, value in given.items()}
        if operator in _ONLY_SHAPED:
            images = next(mine[name].shape[0] for name in _ONLY_SHAPED[operator] if mine[name] is not None)
            like = mine["like"]
            mine["like"] = like.as_strided((images, *like.shape[1:]), (0,) * like.dim())
        results = function(**mine)
        whole = function(**{name: _on_meta(value) for name, value in given.items()})  # for shapes and strides
        alone = isinstance(results, Tensor)
        made = []
        for i, (result, like) in enumerate(zip([results], [whole], strict=True) if alone else zip(results, whole, strict=True)):
            absent = like.dim() == 1 and like.numel() == 0  # what was not asked for
            placements = [_placement("-" if absent else of_results[i]) for _, of_results in letters]
            made.append(DTensor.from_local(result, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()))
        return made[0] if alone else tuple(made)

    return rule


def _register() -> None:
    from torch.distributed.tensor import DTensor

    for operator in _ARGUMENTS:
        torch.library.register_torch_dispatch(getattr(OPERATORS, operator).default, DTensor, _rule(operator))


when_imported("torch.distributed.tensor", _register)  # a second that most never need
