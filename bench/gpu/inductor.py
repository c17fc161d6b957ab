"""What torch.compile made of a max-pool's backward pass: a scatter, a gather, or a call of PyTorch's own kernel. Read from the code that it generated.

Compiled networks are peers, and this pass decides how good a peer they are: the scatter writes the whole gradient twice and adds to it atomically.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

NAME = "max_pool2d_with_indices_backward"
SCATTER, GATHER, OWN, UNKNOWN = "scatter", "gather", "PyTorch's own kernel", "unknown"
KERNEL = re.compile(r"^(?P<name>\w+) = async_compile\.\w+\((?P<head>[^\n]*?)(?:r?'''|r?\"\"\")(?P<body>.*?)(?:'''|\"\"\")", re.MULTILINE | re.DOTALL)
CALLED = re.compile(rf"aten\.{NAME}(?:\.default)?\(")
SCATTERED = re.compile(r"aten\.scatter_(?:reduce|add)_?[\w.]*\(")


def generated() -> list[Path]:
    """The files of code that torch.compile has loaded in this process, in that order; none where this torch keeps no such list."""
    try:
        from torch._inductor.codecache import PyCodeCache

        return [Path(module.__file__) for module in PyCodeCache.modules if getattr(module, "__file__", None)]
    except (ImportError, AttributeError, TypeError):
        return []


def pool_backward(texts: Iterable[str]) -> str:
    """SCATTER, GATHER or OWN, from the generated code; UNKNOWN where no max-pool's backward is in it."""
    found = set()
    for text in texts:
        if NAME not in text:
            continue
        if CALLED.search(text):
            found.add(OWN)
        bodies = [m["body"] for m in KERNEL.finditer(text) if NAME in m["name"] or "scatter" in m["name"]]
        if SCATTERED.search(text) or any("atomic_add" in body for body in bodies):
            found.add(SCATTER)
        elif any(NAME in m["name"] for m in KERNEL.finditer(text)):
            found.add(GATHER)
    return next((how for how in (SCATTER, OWN, GATHER) if how in found), UNKNOWN)


def told(entries: Sequence[dict[str, Any]], texts: Iterable[str], most: int = 12) -> dict[str, Any]:
    """For the report: what became of the max-pool's backward pass, and the largest kernels that torch.compile wrote, by the profile: name and microseconds."""
    own = [(entry["name"], entry["us"]) for entry in entries if entry["name"].startswith(("triton_", "## Call CompiledFxGraph"))]
    return {"pool_backward": pool_backward(texts), "kernels": own[:most]}
