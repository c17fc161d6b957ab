"""Several processes by torchrun and by the command: the weights of one, sharded ones too, killed workers, two hosts, and the plain example."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import formats
import pytest
import torch
from conftest import environment

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_torchrun.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")

# No batch norm, whose statistics are those of a process's own images, and no augmentation, whose numbers each process draws.
PLAIN = (
    "--model.name", "vgg16", "--model.width", "0.03125", "--model.lr", "0.01", "--data", "CIFAR10", "--data.root", "files", "--data.validation", "10",
    "--data.crop", "0", "--data.flip", "false", "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--checkpoint.monitor", "val/loss",
)  # fmt: skip

CALLBACKS = '''
import os, signal
from pathlib import Path
from lightning.pytorch import Callback

class KillOnce(Callback):
    """The second process is killed in the third epoch, the first time."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.global_rank, trainer.current_epoch, batch_idx) == (1, 2, 1) and not Path("killed").exists():
            Path("killed").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
'''


def run(folder: Path, *command: object, timeout: float = 500, **variables: str) -> "subprocess.CompletedProcess[str]":
    given = {**environment(), "OMP_NUM_THREADS": "1", **variables}
    given["PYTHONPATH"] += f"{os.pathsep}{folder}"
    return subprocess.run([str(part) for part in command], cwd=folder, env=given, capture_output=True, text=True, timeout=timeout)


def fit(folder: Path, *arguments: str) -> dict:
    """The last checkpoint of a run of the command."""
    folder.mkdir(exist_ok=True)
    formats.write_cifar(folder / "files")
    result = run(folder, sys.executable, "-m", "interflow_vision", "fit", *PLAIN, *arguments)
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "runs" / "digits" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def alone(lightning_cli, tmp_path_factory):
    """The weights of one process with batches of ten images."""
    return fit(tmp_path_factory.mktemp("alone"), "--data.batch_size", "10")["state_dict"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_give_the_weights_of_one(alone, strategy, tmp_path):
    kept = fit(tmp_path, "--data.batch_size", "5", "--trainer.devices", "2", "--trainer.strategy", strategy)
    assert kept["global_step"] == 6
    assert set(kept["state_dict"]) == set(alone)
    start = torch.load(tmp_path / "runs" / "digits" / "version_0" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(value.shape == alone[name].shape for name, value in start.items())
    for name, value in alone.items():
        torch.testing.assert_close(kept["state_dict"][name], value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_a_sharded_run_goes_on_and_predicts(lightning_cli, tmp_path):
    fit(tmp_path, "--data.batch_size", "5", "--trainer.devices", "2", "--trainer.strategy", "fsdp2")
    last = tmp_path / "runs" / "digits" / "version_0" / "checkpoints" / "last.ckpt"
    result = run(tmp_path, sys.executable, "-m", "interflow_vision", "fit", "--ckpt_path", "last", "--trainer.max_epochs", "3")
    assert result.returncode == 0, result.stderr
    assert torch.load(last, weights_only=True)["global_step"] == 9
    (tmp_path / "a.png").write_bytes(formats.png(formats.pictures(1)[0][0]))
    result = run(tmp_path, sys.executable, "-m", "interflow_vision", "predict", "--ckpt", last, "a.png")
    assert result.returncode == 0 and result.stdout.startswith("a.png\tclass")


def test_a_killed_workers_run_goes_on_by_itself(lightning_cli, tmp_path):
    formats.write_cifar(tmp_path / "files")
    (tmp_path / "given.py").write_text(CALLBACKS)
    options = (*PLAIN, "--data.batch_size", "5", "--trainer.max_epochs", "4", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    command = ("--standalone", "--nproc_per_node", "2", "--max-restarts", "2", "-m", "interflow_vision", "fit", *options)
    result = run(tmp_path, *TORCHRUN, *command, "--trainer.callbacks+=given.KillOnce")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "killed").exists() and "Restored all states from the checkpoint" in result.stdout + result.stderr
    assert [path.name for path in (tmp_path / "runs" / "digits").iterdir()] == ["version_0"]
    kept = torch.load(tmp_path / "runs" / "digits" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 12 and kept["epoch"] == 3
    unbroken = tmp_path / "unbroken"
    unbroken.mkdir()
    shutil.copytree(tmp_path / "files", unbroken / "files")
    assert run(unbroken, *TORCHRUN, *command).returncode == 0
    expected = torch.load(unbroken / "runs" / "digits" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in expected.items():
        assert torch.equal(kept["state_dict"][name], value), name


def test_the_plain_example_trains_and_goes_on(tmp_path):
    formats.write_mnist(tmp_path / "files", train=6000, test=20)
    options = ("--root", "files", "--width", "0.03125", "--steps", "3", "--batch-size", "16", "--checkpoint", "last.pt")
    result = run(tmp_path, *TORCHRUN, "--standalone", "--nproc_per_node", "2", EXAMPLE, *options, "--epochs", "2")
    assert result.returncode == 0, result.stderr
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["1/2", "2/2"]
    result = run(tmp_path, sys.executable, EXAMPLE, *options, "--epochs", "3")
    assert result.returncode == 0, result.stderr
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["3/3"]
    assert len(EXAMPLE.read_text().splitlines()) <= 120


# two hosts


def networks() -> str | None:
    """Why two network namespaces cannot be had here, None where they can."""
    if shutil.which("ip") is None:
        return "the command ip is missing"
    made = subprocess.run(["ip", "netns", "add", "interflow-try"], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip()}"
    veth = subprocess.run(["ip", "-n", "interflow-try", "link", "add", "name", "end0", "type", "veth", "peer", "name", "end1"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "interflow-try"], check=True)
    return None if veth.returncode == 0 else f"no virtual network cards: {veth.stderr.strip()}"


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them: names and addresses."""
    why = networks()
    if why is not None:
        pytest.skip(why)
    names = [f"interflow-{os.getpid()}-{i}" for i in (0, 1)]
    addresses = ["10.77.0.1", "10.77.0.2"]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        subprocess.run(["ip", "-n", names[0], "link", "add", "name", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1]], check=True)
        for name, address in zip(names, addresses, strict=True):
            subprocess.run(["ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable"], check=True)
            subprocess.run(["ip", "-n", name, "link", "set", "cable", "up"], check=True)
        yield list(zip(names, addresses, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_hosts_give_the_weights_of_one(alone, hosts, tmp_path):
    formats.write_cifar(tmp_path / "files")
    variables = {**environment(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
    options = (*PLAIN, "--data.batch_size", "5", "--trainer.devices", "1", "--trainer.num_nodes", "2", "--trainer.strategy", "ddp")
    where = ("--nnodes", "2", "--nproc_per_node", "1", "--master_addr", hosts[0][1], "--master_port", "29411")
    running = []
    for rank, (name, _) in enumerate(hosts):
        command = ("ip", "netns", "exec", name, *TORCHRUN, *where, "--node_rank", str(rank), "-m", "interflow_vision", "fit", *options)
        running.append(subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate(timeout=500)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    kept = torch.load(tmp_path / "runs" / "digits" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in alone.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
