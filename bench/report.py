"""pytest-benchmark's JSON as a table of targets and measurements: python bench/report.py bench/results/NAME/head.json"""

import json
import sys
from pathlib import Path
from typing import Any

TITLE = "# The head on the CPU: measured against target\n"


def row(info: dict[str, Any]) -> tuple[str, str, str, str, str] | None:
    """Case, target, measured, throughput, reached; None for providers that are yardsticks."""
    target = info.get("target", {})
    wanted, got, reached = [], [], []
    if info["provider"] == "ours" and "peer_ratio" in info:
        ratio, low, high = info["peer_ratio"]
        share = info.get("read_share", [0])[0]
        got.append(f"{ratio:.2f}x {info['peer']} [{low:.2f}, {high:.2f}]")
        if share:
            got.append(f"{share:.2f} of read")
        if "peer" in target:
            wanted.append(f">= {target['peer']:.1f}x")
            reached.append(ratio >= target["peer"])
        if "read" in target:
            wanted.append(f">= {target['read']:.2f} of read")
            reached.append(share >= target["read"])
    if info["provider"] == "ours" and "added_ratio" in info:
        got = [f"adds {info['added_ms']['ours']} ms, eager {info['added_ms']['eager']} ms: {info['added_ratio']}x less"]
        wanted = [f">= {target['added_ratio']:.0f}x less"]
        reached = [info["added_ratio"] >= target["added_ratio"]]
    key = {"raw operator": "raw_us", "head(xs)": "head_us"}.get(info["provider"])
    if key:
        got, wanted = [f"{info['us_per_call']} us"], [f"<= {target[key]:.0f} us"]
        reached = [info["us_per_call"] <= target[key]]
    if not got:
        return None
    name = info["case"] if not key else f"{info['provider']}, tiny inputs, inference_mode"
    speed = f"{info['p50_us'] / 1e3:.2f} ms, {info['gb_per_s']} GB/s" if "gb_per_s" in info else ""
    return name, ", ".join(wanted) or "-", ", ".join(got), speed, ("yes" if all(reached) else "**no**") if reached else "-"


def report(data: dict[str, Any]) -> str:
    machine = data["benchmarks"][0]["extra_info"]
    commit = data.get("commit_info", {}).get("id", "unknown")[:10]
    lines = [TITLE, f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {data['datetime'][:10]}, commit {commit}."]
    lines += ["Medians of interleaved rounds; ratio = time of the better of eager and torch.compile / ours, paired, with its 95 % interval;"]
    lines += ["read = `sum` over the same bytes. Made by `make bench`.\n", "| case | target | measured | ours | reached |", "|---|---|---|---|---|"]
    rows = [row(benchmark["extra_info"]) for benchmark in data["benchmarks"]]
    lines += ["| " + " | ".join(r) + " |" for r in rows if r is not None]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    source = Path(sys.argv[1])
    text = report(json.loads(source.read_text()))
    (source.parent / "report.md").write_text(text)
    print(text)
