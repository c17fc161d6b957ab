"""pytest settings of the benchmarks: options, what is collected, the replaying clock, the machine in the JSON."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from harness import machine
from harness.clock import REPLAY
from harness.run import Session

SESSIONS = pytest.StashKey[Session]()
STARTED = time.perf_counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("interflow benchmarks")
    group.addoption("--full", action="store_true", help="every case: more batches, 224 pixels, compiled networks, max-autotune")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--scale", type=float, default=1.0, help="multiplies the seconds that each case is timed for")
    group.addoption("--budget", type=float, default=None, help="seconds after which no further case is begun")
    group.addoption("--case", default="", help="only cases whose name contains this text")


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("--device"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    budget = config.getoption("--budget")
    config.stash[SESSIONS] = Session(
        device, config.getoption("--scale"), patience=60.0 if device.type == "cpu" else 5.0, deadline=None if budget is None else STARTED + budget
    )


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    named = parent.session.isinitpath(file_path)  # pytest itself collects a file that the command line names
    if file_path.name.startswith("bench_") and file_path.suffix == ".py" and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each case and provider of the module's `plans(full, device)`, a case's providers one after the other."""
    if "plan" in metafunc.fixturenames:
        config = metafunc.config
        plans = metafunc.module.plans(config.getoption("--full"), config.stash[SESSIONS].device)
        pairs = [(plan, provider) for plan in plans if config.getoption("--case") in plan.name for provider in plan.providers]
        metafunc.parametrize(("plan", "provider"), pairs, ids=[f"{plan.name}, {provider}" for plan, provider in pairs])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))


@pytest.fixture
def session(request: pytest.FixtureRequest) -> Session:
    return request.config.stash[SESSIONS]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()  # the name of somebody's computer belongs in no report
    machine_info.update(machine.describe(config.stash[SESSIONS].device))


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    for key in ("author_time", "branch", "project"):
        commit_info.pop(key, None)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    chosen = config.stash[SESSIONS]
    output_json["run"] = {
        "set": "full" if config.getoption("--full") else "quick",
        "timed_s": round(chosen.timed),
        "others_cores": round(max(0.0, chosen.others / max(chosen.timed, 1e-9)), 2),
        "whole_s": round(time.perf_counter() - STARTED),
    }
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)  # hundreds of lines each; extra_info has them in one


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.write_line(f"timed for {config.stash[SESSIONS].timed:.0f} s of {time.perf_counter() - STARTED:.0f} s")
