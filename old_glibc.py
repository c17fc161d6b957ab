"""A copy of a static archive that asks for older versions of glibc's functions than the newest that the building machine has.

setup.py links the CUDA runtime, an archive, into our library. pthread_create and its like moved into libc with glibc 2.34, under a new version each, and
kept the old versions: the linker takes the newest where the archive names none, and the library would not load on an older system. For our own sources
csrc/common/old_glibc.h does the same.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

OLDEST_GLIBC = (2, 28)
"""Of a machine that the libraries run on: RHEL 8, Ubuntu 20.04, Debian 10 (manylinux_2_28)."""


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def libc() -> Path | None:
    """glibc as the C compiler links it; None where there is none, as beside musl."""
    try:
        said = output_of(*shlex.split(os.environ.get("CC") or "cc"), "-print-file-name=libc.so.6").strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return Path(said) if Path(said).is_absolute() else None


def versions(listed: str) -> dict[str, list[tuple[int, ...]]]:
    """Of each function, the versions that `nm -D --defined-only` lists for the library, the default one marked by @@, oldest first."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for name, version in re.findall(r" [TWi] (\w+)@@?GLIBC_([\d.]+)$", listed, re.MULTILINE):
        found.setdefault(name, []).append(tuple(map(int, version.split("."))))
    return {name: sorted(each) for name, each in found.items()}


def renamed(undefined: set[str], known: dict[str, list[tuple[int, ...]]], most: tuple[int, ...] = OLDEST_GLIBC) -> dict[str, str]:
    """{pthread_create: pthread_create@GLIBC_2.2.5}: the newest version up to `most` of each function whose newest is newer than that."""
    into = {}
    for name in sorted(undefined & known.keys()):
        old = [version for version in known[name] if version <= most]
        if old and old[-1] != known[name][-1]:
            into[name] = f"{name}@GLIBC_{'.'.join(map(str, old[-1]))}"
    return into


def for_old_systems(archive: Path, folder: Path) -> Path:
    """A copy in `folder`, under the archive's name, whose undefined symbols carry the older versions.

    The archive itself where nothing is to be renamed, and, with a sentence, where no copy can be made.
    """
    missing = [tool for tool in ("nm", "objcopy") if shutil.which(tool) is None]
    system = libc()
    if missing or system is None:
        cause = f"no {' and no '.join(missing)} (binutils)" if missing else "the C compiler names no glibc"
        print(f"interflow-kernels: {archive.name} is linked as it is ({cause}): the CUDA library may need a glibc as new as this machine's")
        return archive
    defined = set(re.findall(r" [a-zA-Z] (\S+)$", output_of("nm", "--defined-only", str(archive)), re.MULTILINE))
    undefined = set(re.findall(r"^ +[Uw] (\S+)$", output_of("nm", "--undefined-only", str(archive)), re.MULTILINE))
    pairs = renamed(undefined - defined, versions(output_of("nm", "-D", "--defined-only", str(system))))
    if not pairs:
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    table, made = folder / f"{archive.name}.versions", folder / archive.name
    table.write_text("".join(f"{name} {versioned}\n" for name, versioned in pairs.items()))
    subprocess.run(["objcopy", f"--redefine-syms={table}", str(archive), str(made)], check=True)
    return made
