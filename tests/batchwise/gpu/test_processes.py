"""Several processes, also on one GPU, train as one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small
import torch

pytestmark = pytest.mark.gpu

FILE = Path(__file__).parent / "process.py"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run(kind: str, backend: str, processes: int, one_device: bool, accelerator: str, folder: Path) -> dict[str, Any]:
    """Train in several processes; return the weights and the loss.

    Lightning refuses one device twice. So processes on one device are nodes, each of which has this device.
    """
    nodes, devices = (processes, 1) if one_device else (1, processes)
    settings = {"accelerator": accelerator, "devices": devices, "num_nodes": nodes, "default_root_dir": str(folder)}
    path, port = folder / "weights.pt", str(free_port())
    arguments = json.dumps([kind, backend, str(path), settings])
    started = []
    for rank in range(processes):
        node, local = (rank, 0) if one_device else (0, rank)
        place = {"NODE_RANK": str(node), "LOCAL_RANK": str(local), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        # An interface of this machine, because gloo would ask for the address of the machine's name.
        more = {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(FILE), arguments]
        started.append(
            subprocess.Popen(
                command,
                env=os.environ | more | place,
                cwd=folder,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        said = [one.communicate(timeout=100)[0] for one in started]
    finally:
        for one in started:
            one.kill()
    assert [one.returncode for one in started] == [0] * processes, "\n".join(text[-2000:] for text in said)
    result = torch.load(path, weights_only=True)
    assert result["world"] == processes
    return result


def compare(result: dict[str, Any], accelerator: str) -> None:
    one, trainer = small.fit(data=small.Points(micro_batch_size=3), accelerator=accelerator, devices=1)
    assert small.furthest(one.network, small.network()) > 0.1
    expected = one.state_dict()
    assert result["weights"].keys() == expected.keys()
    assert max(float((expected[name].cpu() - value).abs().max()) for name, value in result["weights"].items()) < 1e-10
    assert result["loss"].item() == pytest.approx(trainer.callback_metrics["val/loss"].item(), abs=1e-10)


def test_two_processes_on_one_device(device: torch.device, tmp_path: Path) -> None:
    compare(run("ddp", "gloo", 2, True, device.type, tmp_path), device.type)


def test_sharding_on_one_device(device: torch.device, tmp_path: Path) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    compare(run("shard", backend, 1, True, device.type, tmp_path), device.type)


@pytest.mark.parametrize("kind", ["ddp", "shard"])
def test_two_devices(kind: str, device: torch.device, tmp_path: Path) -> None:
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    backend = "nccl" if device.type == "cuda" else "gloo"
    compare(run(kind, backend, 2, False, device.type, tmp_path), device.type)
