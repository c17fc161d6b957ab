"""What makes two builds of the same sources give the same bytes: one time stamp, and a source archive without traces of the machine.

setup.py uses it. The wheel takes its time stamps from SOURCE_DATE_EPOCH by itself.
"""

import gzip
import os
import tarfile
from pathlib import Path

from setuptools.command.sdist import sdist

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

TIME = str(10 * 365 * 24 * 3600 + 2 * 24 * 3600)
"""1 January 1980, the oldest time that a wheel, a zip file, can hold: what files get where SOURCE_DATE_EPOCH is not set."""


def set_time() -> None:
    """SOURCE_DATE_EPOCH, in seconds since 1970, for everything that is built from here on."""
    given = os.environ.setdefault("SOURCE_DATE_EPOCH", TIME)
    if not given.isdecimal():
        raise SystemExit(f"SOURCE_DATE_EPOCH must be whole seconds since 1970, got {given!r}")


def mode(folder: bool, given: int) -> int:
    """A file's permissions, of which only that to execute it is kept."""
    return 0o755 if folder or given & 0o100 else 0o644


def without_traces(archive: Path) -> None:
    """Writes a .tar.gz anew: names in order, one time, no owner, and of the modes only whether a file may be executed."""
    seconds = int(os.environ["SOURCE_DATE_EPOCH"])
    made = archive.with_name(f".{archive.name}.partial")
    with (
        tarfile.open(archive) as old,
        made.open("wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=seconds) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda each: each.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = seconds, 0, 0, "", ""
            member.mode = mode(member.isdir(), member.mode)
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    made.replace(archive)


class SourceArchive(sdist):
    """setuptools' sdist, whose archives have the same bytes wherever and whenever they are made of the same files."""

    def make_archive(self, *arguments, **options):
        made = super().make_archive(*arguments, **options)
        if made.endswith(".tar.gz"):
            without_traces(Path(made))
        return made


class Wheel(bdist_wheel):
    """setuptools' wheel, whose files may be read by everybody and, where anybody may, be executed, whatever the umask was."""

    def write_wheelfile(self, *arguments, **options):
        super().write_wheelfile(*arguments, **options)
        for path in Path(self.bdist_dir).rglob("*"):  # all that is about to be packed
            path.chmod(mode(path.is_dir(), path.stat().st_mode))


COMMANDS = {"sdist": SourceArchive, "bdist_wheel": Wheel}


def compiler_flags(root: Path, torch: Path) -> list[str]:
    """Flags by which no path of this machine gets into a library: __FILE__ of our sources and of torch's headers."""
    return [f"-ffile-prefix-map={root}/=", f"-ffile-prefix-map={torch}/=torch/"]
