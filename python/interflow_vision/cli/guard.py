"""The guard round a whole command: what a user can mend is one sentence, what only we can mend keeps its traceback.

Exit codes: 2 after a sentence, 70 (EX_SOFTWARE) after a traceback, 130 after Ctrl-C (training: 143 after SIGTERM),
141 where the reader of stdout has gone, as after `| head`.
"""

import errno
import linecache
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError, one_line

USER, FAULT, INTERRUPTED, PIPE_CLOSED = 2, 70, 130, 141
"""Exit codes."""

_MEMORY = re.compile(
    r"not enough memory|can't allocate memory|cannot allocate memory|out of memory|Storage size calculation overflowed|integer multiplication overflow"
)
# torch's words for what a user did, each with what to do about it
_KNOWN = (
    (re.compile(r"Expected more than 1 value per channel when training"), "the batch norm needs more than one value for each channel: "
     "a batch of one image is too small for maps of one pixel; give --data.batch_size 2 or more, or larger images"),
    (re.compile(r"Target -?\d+ is out of bounds"), "the data set has a label that is no class of the model; labels go from 0 to --model.num_classes - 1"),
    (re.compile(r"DataLoader worker .*(exited unexpectedly|is killed by signal)"), "a process that reads images has ended unexpectedly, most often for "
     "want of memory: give a smaller --data.num_workers (0 reads without processes) or --data.batch_size"),
)  # fmt: skip
_RESTORED_EPOCH = re.compile(r"current_epoch=(\d+), but you have set Trainer\(max_epochs=(\d+)\)")
_OWN_SENTENCE = re.compile(r"(?:^|\n)(?:interflow_vision\.errors\.)?(?:UserError|MissingPackageError): (.+?)\s*\Z", re.DOTALL)
_OWN = ("interflow_vision", "interflow_kernels")
_REFUSALS = ("ValueError", "TypeError", "RuntimeError", "MisconfigurationException")


def run(command: Callable[[], int | None], name: str) -> int:
    """Runs a command; its exit code, 0 where it returns none. `name` is how lines on stderr begin."""
    try:
        code = command() or 0
        sys.stdout.flush()  # here, where a reader that has gone is noticed
        return code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # what is still buffered has no reader; without this, Python complains when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        sentence = explained(error)
        if sentence is not None:
            print(f"{name}: {sentence}", file=sys.stderr)
            return USER
        traceback.print_exc()
        print(f"{name}: {_whose_fault(error)}", file=sys.stderr)
        return FAULT


def explained(error: BaseException) -> str | None:
    """One sentence for an error that a user can mend, None for one that only the package can."""
    text = str(error)
    if isinstance(error, UserError) or _OWN_SENTENCE.search(text):
        # an error from a process that reads images, or trains, comes with that process's traceback before it
        own = _OWN_SENTENCE.search(text)
        return " ".join((own[1] if own else text).split())
    if isinstance(error, ModuleNotFoundError):
        return _missing_module(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MEMORY.search(text)):
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
        return f"memory does not suffice{f' for {asked[1]}' if asked else ''}: give a smaller --data.batch_size, --data.size or --model.width"
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        remedy = "; make room and go on with --ckpt_path last" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{where}{error.strerror}{remedy}"
    for pattern, sentence in _KNOWN:
        if pattern.search(text):
            return sentence
    if match := _RESTORED_EPOCH.search(text):
        return f"the checkpoint has {match[1]} epochs already, so --trainer.max_epochs {match[2]} leaves nothing to train: give more"
    return _first_sentence(error) if _is_refusal(error) else None


def _missing_module(error: ModuleNotFoundError) -> str | None:
    package = (error.name or "jsonargparse[signatures]").partition(".")[0]  # LightningCLI names no module when it misses this one
    if package in _OWN:
        return None
    return f'the command needs the package {package}, which is not installed: pip install "interflow-kernels[train]"'


def _is_refusal(error: BaseException) -> bool:
    """Whether a `raise` of this package or of Lightning refused what it was given, rather than some operation failed."""
    if not any(kind.__name__ in _REFUSALS for kind in type(error).__mro__):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not _is_in(frames[-1].filename, (*_OWN, "lightning", "jsonargparse")):
        return False
    line = linecache.getline(frames[-1].filename, frames[-1].lineno or 0)
    return line.strip().startswith("raise ")


def _is_in(file: str, packages: tuple[str, ...]) -> bool:
    return any(package in Path(file).parent.parts for package in packages)


def _whose_fault(error: BaseException) -> str:
    standard = os.path.dirname(os.__file__)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = frame.filename
        if os.path.isfile(file) and not file.startswith(standard) and not _is_in(file, ("site-packages", "dist-packages", *_OWN)):
            return f"this error comes from {file}, which is not part of the package"
    return "this is a fault of the package: please report it with the lines above and what `python -m interflow_kernels.info` prints"


def _first_sentence(error: BaseException) -> str:
    """An error's message in one line, without the hints that Lightning puts below it."""
    return one_line(error).partition(" HINT: ")[0]
