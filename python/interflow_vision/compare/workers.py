"""Runs side by side: a process for each core or GPU that is asked for, one study at a time in a folder."""

import fcntl
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import results
from .plan import Run

_device: int | None = None  # of this worker


def default_jobs(threads: int) -> int:
    """As many as there are GPUs, or else as cores allow with so many threads each."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside it no other process trains into the folder; UserError where one does, or where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be written ({error.strerror}); choose another with --out") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process trains into {folder} at this moment; wait for it, or choose another folder with --out") from error
        yield


def train(runs: Sequence[Run], folder: Path, jobs: int, threads: int, say: Callable[[str], None]) -> None:
    """Performs the runs, `jobs` at a time, each in `threads` threads; a line for each that is done.

    A run that fails ends the others that wait; what is done is kept. Raises UserError with the run's name, or the run's own error.
    """
    if not runs:
        return
    import torch

    context = multiprocessing.get_context("spawn")
    gpus: Any = context.Queue()
    for number in range(jobs):
        gpus.put(number % torch.cuda.device_count() if torch.cuda.is_available() else None)
    began, done = time.time(), 0
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(os.getpid(), threads, gpus)) as pool:
        waiting: dict[Future[results.Result], Run] = {pool.submit(_perform, run, folder): run for run in runs}
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    run, done = waiting.pop(future), done + 1
                    say(_line(run, _result(run, future), done, len(runs), time.time() - began))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _result(run: Run, future: "Future[results.Result]") -> results.Result:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise UserError(f"a process ended while {run.cell} with seed {run.seed} was trained, most often for want of memory: give a smaller --jobs") from error


def _begin(parent: int, threads: int, gpus: Any) -> None:
    global _device
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import torch

    from ..training.quiet import quiet

    torch.set_num_threads(threads)
    _device = gpus.get()
    quiet()
    warnings.filterwarnings("ignore")


def _end_with(parent: int) -> None:
    """Ends this worker where its parent was killed: nobody would take what it finds, and it would wait for ever for more."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def _perform(run: Run, folder: Path) -> results.Result:
    import logging

    from .run import perform

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return perform(run, folder, _device)


def _line(run: Run, result: results.Result, done: int, total: int, seconds: float) -> str:
    left = seconds / done * (total - done)
    if result["status"] != "done":
        found = "diverged"
    elif run.final:
        found = f"test accuracy {result['test']['accuracy']:.2%}"
    else:
        found = f"validation accuracy {result['validation']['accuracy']:.2%}"
    kind = "" if run.final else "tuning, "
    return f"{done}/{total}  {run.cell}  {kind}seed {run.seed}, rate {run.rate:g}: {found}, {result['seconds']:.0f} s; {left / 60:.0f} min to go"
