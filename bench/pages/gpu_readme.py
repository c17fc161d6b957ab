"""The README's section on a GPU, written from the committed results of `make gpu`: make bench-readme"""

import json
import sys
from pathlib import Path
from typing import Any

from pages.readme import ROOT, rewritten
from pages.results import prose

BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
FOLDER = "bench/results/nvidia-h200"
SHAPE = " 224px bf16 channels_last"  # of every cell of the headline
OTHERS = {"plain": "plain", "Interflow naive": "naive"}


def read(folder: Path, part: str) -> dict[str, Any]:
    return json.loads((folder / f"{part}.json").read_text())


def section(folder: str) -> str:
    """What stands between the marks, the marks included. `folder`: the results' path as the README names it."""
    headline, smoke, test, speed = (read(ROOT / folder, part) for part in ("headline", "smoke", "test", "speed"))
    machine = headline["machine"]
    ours = [row for row in headline["rows"] if row.get("kind") == "ours"]
    checked = [row["state"] for row in smoke["rows"]]
    passed, failed = (sum(row.get(key, 0) for row in test["rows"]) for key in ("passed", "failed"))
    whole = (row for row in speed["rows"] if "reached" in row and (row["what"] == "head" or row["map"] == "five boundaries"))  # what the targets are of
    reached = [row["reached"] for row in whole]
    lines = [
        BEGIN,
        prose(
            f"On an {machine['gpu']}, torch {machine['versions']['torch']}, {headline['date'][:10]}: whole networks, 224 pixels, bf16, channels_last,"
            " 1000 classes, eager unless a row says otherwise. Ratio: the time of the network without Interflow (plain), and of Interflow in"
            " PyTorch's operators (naive), over ours, with its 95 % interval."
        ),
        "",
        "| with Interflow, fused | ms | images/s | plain / ours | naive / ours |",
        "|---|---|---|---|---|",
        *map(_line, ours),
        "",
        prose(
            f"There {checked.count('ok')} of {len(checked)} checks of the kernels beside the CPU were right, and {passed} of {passed + failed} tests."
            f" Targets of single kernels reached: {sum(reached)} of {len(reached)}; `docs/gpu-model.md` has each beside its prediction,"
            f" `{folder}/` all that was measured."
        ),
        END,
    ]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    ratios = " | ".join("{:.2f}x [{:.2f}, {:.2f}]".format(*row["speed_up"][name]) for name in OTHERS)
    return f"| {row['case'].replace(SHAPE, '')} | {row['p50_us'] / 1e3:.2f} | {row['images_per_s']:.0f} | {ratios} |"


def main(folder: str) -> None:
    path = ROOT / "README.md"
    path.write_text(rewritten(path.read_text(), section(folder.rstrip("/")), (BEGIN, END)))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else FOLDER)
