"""A static archive that asks for older versions of glibc's functions: as the CUDA runtime does that is linked into the CUDA library."""

import ctypes
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bench_modules import room

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import old_glibc  # noqa: E402

kit = room("gpu.kit")

SOURCE = """
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <string.h>
static sem_t done;
static int found;
__attribute__((visibility("hidden"))) int shm_unlink(const char* name) { return name[0]; }  /* of the archive itself, though glibc has one */
static void* work(void* at) { found = *(int*)at + 1; sem_post(&done); return dlsym(RTLD_DEFAULT, "strlen"); }
int answer(int given) {
  pthread_t thread;
  void* symbol = 0;
  sem_init(&done, 0, 0);
  if (pthread_create(&thread, 0, work, &given)) return -1;
  sem_wait(&done);
  pthread_join(thread, &symbol);
  return symbol ? found + shm_unlink("\\5") : -2;
}
"""


@pytest.fixture
def archive(tmp_path):
    """As a compiler makes it: its symbols have no versions."""
    tools = ("cc", "ar", "nm", "objcopy")
    if [tool for tool in tools if shutil.which(tool) is None] or platform.system() != "Linux" or old_glibc.libc() is None:
        pytest.skip("needs a C compiler, binutils and glibc")
    (tmp_path / "source.c").write_text(SOURCE)
    subprocess.run(["cc", "-c", "-O1", "-fPIC", "source.c", "-o", "source.o"], cwd=tmp_path, check=True)
    subprocess.run(["ar", "rcs", "libsmall.a", "source.o"], cwd=tmp_path, check=True)
    return tmp_path / "libsmall.a"


def linked(archive: Path) -> Path:
    library = archive.with_suffix(".so")
    words = ["-Wl,--whole-archive", str(archive), "-Wl,--no-whole-archive", "-Wl,-z,now", "-lpthread", "-ldl"]
    subprocess.run(["cc", "-shared", "-o", str(library), *words], check=True)
    return library


def test_the_library_needs_no_newer_glibc_and_works(archive, tmp_path):
    as_it_is = kit.glibc_needed(kit.undefined(linked(archive)))
    made = old_glibc.for_old_systems(archive, tmp_path / "made")
    if as_it_is <= old_glibc.OLDEST_GLIBC:
        assert made == archive  # a system that is old itself: nothing to rename
        return
    assert made == tmp_path / "made/libsmall.a"
    library = linked(made)
    symbols = kit.undefined(library)
    assert kit.glibc_needed(symbols) <= old_glibc.OLDEST_GLIBC, symbols
    assert {name.partition("@")[0] for name in symbols} >= {"pthread_create", "pthread_join", "dlsym", "sem_post"}
    assert ctypes.CDLL(str(library)).answer(41) == 42 + 5  # a thread of its own, a semaphore, dlsym, and the archive's own function under its name


def test_the_newest_version_that_is_old_enough():
    listed = """
0000000000088c50 T dlmopen@@GLIBC_2.34
0000000000088c50 T dlmopen@GLIBC_2.3.4
000000000009bc20 T memcpy@GLIBC_2.2.5
000000000009bc30 i memcpy@@GLIBC_2.14
0000000000085d60 T pthread_cond_wait@GLIBC_2.2.5
0000000000085d70 W pthread_cond_wait@GLIBC_2.3.2
0000000000085d80 T pthread_cond_wait@@GLIBC_2.34
00000000000f0000 T fstat@@GLIBC_2.33
0000000000000000 A GLIBC_2.34
"""
    known = old_glibc.versions(listed)
    assert known["memcpy"] == [(2, 2, 5), (2, 14)] and set(known) == {"dlmopen", "memcpy", "pthread_cond_wait", "fstat"}
    undefined = {"dlmopen", "memcpy", "pthread_cond_wait", "fstat", "cudaMalloc"}
    assert old_glibc.renamed(undefined, known) == {"dlmopen": "dlmopen@GLIBC_2.3.4", "pthread_cond_wait": "pthread_cond_wait@GLIBC_2.3.2"}
    assert old_glibc.renamed(undefined, known, (2, 34)) == {}  # each default is old enough
    assert old_glibc.OLDEST_GLIBC == kit.OLDEST_GLIBC


@pytest.mark.parametrize("lost", ["objcopy", "libc"])
def test_where_it_cannot_be_made_the_archive_is_linked_as_it_is(archive, tmp_path, monkeypatch, capsys, lost):
    if lost == "objcopy":
        monkeypatch.setattr(old_glibc.shutil, "which", lambda tool: None if tool == "objcopy" else f"/usr/bin/{tool}")
    else:
        monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    assert old_glibc.for_old_systems(archive, tmp_path / "made") == archive
    (said,) = capsys.readouterr().out.splitlines()
    assert "libsmall.a is linked as it is" in said and ("no objcopy (binutils)" if lost == "objcopy" else "names no glibc") in said
