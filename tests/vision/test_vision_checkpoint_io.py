"""Checkpoint files: kills while saving, full and read-only file systems, flipped bits, what is left over."""

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from interflow_vision.errors import UserError
from interflow_vision.training import checkpoint_io, checkpoints
from interflow_vision.training.checkpoint_io import SafeCheckpointIO, before, is_whole


def content(value: float, floats: int = 1000) -> dict:
    return {"w": torch.full((floats,), value), "epoch": value}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def load(path: Path) -> dict:
    return SafeCheckpointIO().load_checkpoint(path, weights_only=True)


@contextmanager
def small_file_system(folder: Path, options: str = "size=5m"):
    """A file system of its own at `folder`; needs root and the right to mount."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"no file system can be mounted here: {'no mount' if done is None else done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_checkpoint_is_what_torch_load_reads_and_the_one_before_is_kept(tmp_path):
    path, io = tmp_path / "new" / "last.ckpt", SafeCheckpointIO()
    for value in (1.0, 2.0, 3.0):
        io.save_checkpoint(content(value), path)
    assert names(path.parent) == {"last.ckpt", "last.ckpt.before"}
    assert torch.load(path, weights_only=True)["epoch"] == 3 and torch.load(before(path), weights_only=True)["epoch"] == 2
    assert torch.equal(load(path)["w"], content(3.0)["w"])
    io.remove_checkpoint(path)
    assert names(path.parent) == set()


def test_twenty_kills_while_saving_lose_nothing(tmp_path):
    path = tmp_path / "last.ckpt"
    floats = 200_000
    SafeCheckpointIO().save_checkpoint(content(0.0, floats), path)
    chance, interrupted, reached = random.Random(0), 0, 0.0
    for _ in range(20):
        child = os.fork()
        if child == 0:  # nothing of pytest may run here, nor the threads of the parent
            try:
                torch.set_num_threads(1)
                while True:
                    reached += 1
                    SafeCheckpointIO().save_checkpoint(content(reached, floats), path)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.02, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kept = load(path)
        assert is_whole(path) and bool((kept["w"] == kept["epoch"]).all())
        assert kept["epoch"] >= reached
        reached = kept["epoch"]
        assert not before(path).exists() or is_whole(before(path))
        interrupted += (tmp_path / ".last.ckpt.partial").exists()
        assert names(tmp_path) <= {"last.ckpt", "last.ckpt.before", ".last.ckpt.partial"}
    assert reached > 0 and interrupted > 0  # some kills did hit a write
    SafeCheckpointIO().save_checkpoint(content(1.0), path)
    assert names(tmp_path) == {"last.ckpt", "last.ckpt.before"}


def test_leftovers_go_at_the_next_start_but_not_what_is_being_written(tmp_path):
    import fcntl

    old, young, busy = (tmp_path / f".{name}.ckpt.partial" for name in ("old", "young", "busy"))
    for path in (old, young, busy):
        path.write_bytes(b"half")
    for path in (old, busy):
        os.utime(path, (time.time() - 3600,) * 2)
    with busy.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        checkpoint_io.remove_leftovers(tmp_path)
        assert names(tmp_path) == {young.name, busy.name}


def test_a_full_disk_is_a_sentence_and_what_was_there_is_whole(tmp_path):
    with small_file_system(tmp_path / "small") as folder:
        path, io = folder / "last.ckpt", SafeCheckpointIO()
        for value in (1.0, 2.0, 3.0):  # 1.6 MB each: three lie side by side while one is written
            io.save_checkpoint(content(value, 400_000), path)
        (folder / "other").write_bytes(bytes(1_000_000))  # now only two fit
        io.save_checkpoint(content(4.0, 400_000), path)
        assert load(path)["epoch"] == 4
        before(path).unlink()
        (folder / "more").write_bytes(bytes(2_000_000))
        for _ in range(2):
            with pytest.raises(
                UserError, match=r"last.ckpt cannot be written \(No space left on device\), but the one from before is whole: make room"
            ) as error:
                io.save_checkpoint(content(5.0, 400_000), path)
            assert len(str(error.value).splitlines()) == 1
        assert load(path)["epoch"] == 4 and bool((load(path)["w"] == 4).all())
        assert not {name for name in names(folder) if name.endswith(".partial")}
        with pytest.raises(UserError, match="make room or choose another folder with --trainer.default_root_dir"):
            io.save_checkpoint(content(5.0, 400_000), folder / "best.ckpt")


def test_a_read_only_file_system_is_a_sentence_and_loses_nothing(tmp_path):
    with small_file_system(tmp_path / "small") as folder:
        path, io = folder / "last.ckpt", SafeCheckpointIO()
        io.save_checkpoint(content(1.0), path)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)"):
            io.save_checkpoint(content(2.0), path)
        assert load(path)["epoch"] == 1
        checkpoint_io.remove_leftovers(folder)


def test_every_flipped_bit_is_noticed_or_does_no_harm(tmp_path):
    path = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint({"w": torch.arange(300.0), "epoch": 3}, path)
    raw, noticed = path.read_bytes(), 0
    for place in range(0, len(raw), 7):
        changed = bytearray(raw)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            kept = load(path)
        except Exception:
            noticed += 1
            continue
        assert torch.equal(kept["w"], torch.arange(300.0)) and kept["epoch"] == 3  # between records
    assert noticed > 100
    for length in range(0, len(raw), 97):
        path.write_bytes(raw[:length])
        with pytest.raises(UserError, match="is damaged"):
            load(path)


def test_a_damaged_checkpoint_names_the_newest_whole_one(tmp_path, checkpoint):
    last = tmp_path / "last.ckpt"
    whole = checkpoint.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for name, raw, age in (("last.ckpt", flipped, 0), ("last.ckpt.before", whole, 10), ("best.ckpt", whole, 20), ("epoch=1.ckpt", whole[:99], 5)):
        (tmp_path / name).write_bytes(raw)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    for read in (checkpoints.read, load):
        with pytest.raises(UserError, match=r"last.ckpt is damaged .*; .*last.ckpt.before is whole, take that one"):
            read(last)
    assert checkpoints.load(before(last)).class_names
