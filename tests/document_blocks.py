"""The ```python blocks of a document, and one of them run as pasted: in a process and a folder of its own."""

import contextlib
import multiprocessing
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SECONDS = 300


class Done(NamedTuple):
    returncode: int | None
    stderr: str


def blocks(document: Path) -> list[str]:
    return BLOCK.findall(document.read_text())


def run(code: str, folder: Path) -> Done:
    """Runs a block in `folder`. Its process comes from a server that has imported torch already, so a block costs no import of torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "interflow_kernels", "interflow_vision"])
    errors = folder / "stderr"
    process = context.Process(target=_run, args=(code, str(folder), str(errors), _wants_backbones(code)))
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
    return Done(process.exitcode, errors.read_text() if errors.exists() else "")


def _wants_backbones(code: str) -> bool:
    return re.search(r'import (timm|torchvision)|attach\("', code) is not None


def _run(code: str, folder: str, errors: str, backbones: bool) -> None:
    os.chdir(folder)
    with open(errors, "w", buffering=1) as file:
        os.dup2(file.fileno(), 2)
        with contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
            if backbones:
                sys.path.insert(0, str(Path(__file__).parent))
                import torchvision_operators

                torchvision_operators.make_importable()
            exec(compile(code, "block", "exec"), {"__name__": "__main__"})
