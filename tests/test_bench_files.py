"""What the commands of bench/ say of results that are missing, cut short, or of another version: one line, exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "bench/results/cpu-2core"
FILE_OF = {"compare": "results.json", "report": "results.json", "readme": "results.json", "profile_page": "profile.json"}


def without_first_samples(text):
    data = json.loads(text)
    del data["benchmarks"][0]["extra_info"]["samples_us"]
    return json.dumps(data)


def without_settings(text):
    data = json.loads(text)
    del data["settings"]
    return json.dumps(data)


def said(script, folder):
    """What `script` prints on stderr for results that it cannot read."""
    folders = [COMMITTED, folder] if script == "compare" else [folder]
    done = subprocess.run([sys.executable, "-m", f"pages.{script}", *folders], capture_output=True, text=True, cwd=ROOT / "bench")
    assert done.returncode == 2, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(str(folder.resolve() / FILE_OF[script]))
    return line


@pytest.mark.parametrize("script", FILE_OF)
def test_missing_results_are_named(script, tmp_path):
    assert "cannot be read (No such file or directory); give a folder" in said(script, tmp_path)


@pytest.mark.parametrize("script", FILE_OF)
def test_a_file_that_was_cut_short_is_named(script, tmp_path):
    whole = (COMMITTED / FILE_OF[script]).read_text()
    (tmp_path / FILE_OF[script]).write_text(whole[: len(whole) // 2])
    assert "is not whole JSON" in said(script, tmp_path)


@pytest.mark.parametrize(
    ("script", "change", "lacks"),
    [
        ("compare", without_first_samples, "benchmark 0 has no 'samples_us'"),
        ("report", lambda text: "[]", "the file has no 'machine_info'"),
        ("readme", lambda text: text.replace('"run":', '"ran":'), "the file has no 'run'"),
        ("profile_page", without_settings, "the file has no 'settings'"),
    ],
)
def test_a_file_of_another_version_is_named(script, change, lacks, tmp_path):
    (tmp_path / FILE_OF[script]).write_text(change((COMMITTED / FILE_OF[script]).read_text()))
    assert f"{lacks}; it may be of another version" in said(script, tmp_path)
