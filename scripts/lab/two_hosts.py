"""Train on two "hosts", pull the cable, kill a host, and show that nothing was lost. Needs Linux and root.

    sudo python scripts/lab/two_hosts.py

A host is a network namespace with one process under `torchrun`. A veth pair is the cable. All traffic stays inside the
machine. The runs train on the digits, in float64, with dropout and a short last batch, and are compared with one
process on one host:

- both hosts train: loss curve and weights are equal to 1e-12;
- the cable is pulled in mid-run: both hosts stop within the timeout and say why; no checkpoint is torn;
- the same command goes on from there, and ends with the same weights;
- a worker is killed: `torchrun --max-restarts` starts all workers again, with the same end;
- a host is killed (all its processes, with SIGKILL): the other stops, and the same command goes on.

Exits with 1 if any of this fails, and with 77 where it cannot be tried.
"""

import argparse
import csv
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

LAB = Path(__file__).resolve().parent
TIMEOUT = 15  # seconds that a process waits for the other
HOSTS = ("batchwise-a", "batchwise-b")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 29513


def ip(*arguments: str, check: bool = True) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)


def connect() -> None:
    """Make the two hosts and the cable between them."""
    disconnect()
    for host in HOSTS:
        ip("netns", "add", host)
    ip("link", "add", "cable0", "netns", HOSTS[0], "type", "veth", "peer", "name", "cable0", "netns", HOSTS[1])
    for host, address in zip(HOSTS, ADDRESSES, strict=True):
        ip("-n", host, "addr", "add", f"{address}/24", "dev", "cable0")
        for link in ("lo", "cable0"):
            ip("-n", host, "link", "set", link, "up")


def disconnect() -> None:
    """Remove them."""
    for host in HOSTS:
        ip("netns", "delete", host, check=False)


def settings(folder: Path, epochs: int) -> list[str]:
    """Return the arguments of `fit` that all runs share."""
    last = "{class_path: batchwise.callbacks.checkpoint.Last, init_args: {every_n_steps: 5}}"
    configs = [LAB / "digits.yaml", LAB / "csv.yaml"]
    values = {
        "trainer.default_root_dir": folder,
        "trainer.precision": "64-true",
        "trainer.max_epochs": epochs,
        "trainer.log_every_n_steps": 1,
        "trainer.callbacks": f"[{last}]",
        "data.batch_size": 100,
        "data.micro_batch_size": 25,
    }
    words = [word for config in configs for word in ("--config", str(config))]
    return [
        *words,
        *(word for key, value in values.items() for word in (f"--{key}", str(value))),
        "--ckpt_path",
        "last",
    ]


def alone(folder: Path, epochs: int) -> None:
    """Train in one process."""
    command = [sys.executable, "-m", "batchwise", "fit", *settings(folder, epochs)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment())


def environment() -> dict[str, str]:
    """Return the environment of all processes."""
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable0", "TP_SOCKET_IFNAME": "cable0"}


def start(folder: Path, epochs: int, restarts: int = 0) -> list[subprocess.Popen[str]]:
    """Start torchrun on both hosts."""
    strategy = f"{{class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {{timeout: '0:00:{TIMEOUT}'}}}}"
    many = ["--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", strategy]
    started = []
    for rank, host in enumerate(HOSTS):
        torchrun = (
            *("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}"),
            *(f"--max-restarts={restarts}", f"--master-addr={ADDRESSES[0]}", f"--master-port={PORT}"),
            *("-m", "batchwise", "fit"),
        )
        command = ["ip", "netns", "exec", host, sys.executable, *torchrun, *settings(folder, epochs), *many]
        with (folder / f"{host}.log").open("a") as log:
            started.append(
                subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment(), process_group=0)
            )
    return started


def wait_for_steps(folder: Path, steps: int, limit: float = 180) -> None:
    """Wait until `last.ckpt` is of the step `steps` or later."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        found = list(folder.glob("digits/*/checkpoints/last.ckpt"))
        if found and read(found[0])["global_step"] >= steps:
            return
        time.sleep(0.02)
    raise TimeoutError(f"no checkpoint of step {steps} in {folder}")


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint; an error means that it is torn."""
    return torch.load(path, weights_only=True)


def end(processes: list[subprocess.Popen[str]], limit: float = 240) -> list[int]:
    """Wait for the end of all; return their exit codes."""
    return [process.wait(limit) for process in processes]


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a host: torchrun and its workers."""
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)
    process.kill()


def children(pid: int) -> list[int]:
    """Return the ids of the child processes."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def losses(folder: Path) -> dict[int, float]:
    """Return the loss of each step; the later one, if a step was trained twice."""
    values = {}
    for path in sorted(folder.glob("digits/*/log/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime):
        with path.open() as file:
            values |= {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}
    return values


def difference(folder: Path, other: Path) -> tuple[float, float]:
    """Return the largest difference of the losses, over the steps in both logs, and that of the last weights."""
    ours, theirs = losses(folder), losses(other)
    curve = max(abs(ours[step] - theirs[step]) for step in ours.keys() & theirs.keys())
    (a,), (b,) = (list(root.glob("digits/*/checkpoints/last.ckpt")) for root in (folder, other))
    ours, theirs = read(a), read(b)
    assert ours["global_step"] == theirs["global_step"], (ours["global_step"], theirs["global_step"])
    pairs = [(ours["state_dict"][name], theirs["state_dict"][name]) for name in theirs["state_dict"]]
    return curve, max((x - y).abs().max().item() for x, y in pairs)


def said(folder: Path) -> list[str]:
    """Return each host's last error line."""
    found = [re.findall(r"^error: .*", (folder / f"{host}.log").read_text(), re.MULTILINE) for host in HOSTS]
    return [lines[-1] if lines else "(nothing)" for lines in found]


def torn(folder: Path) -> int:
    """Return the number of checkpoints that cannot be read."""
    count = 0
    for path in folder.glob("digits/*/checkpoints/*.ckpt"):
        try:
            read(path)
        except Exception:
            count += 1
    return count


def main() -> int:
    """Run all cases and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    epochs = parser.parse_args().epochs
    if os.geteuid() != 0 or sys.platform != "linux":
        print("two hosts are network namespaces of Linux, which take root", file=sys.stderr)
        return 77
    try:
        connect()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"network namespaces cannot be made here: {getattr(error, 'stderr', error)}", file=sys.stderr)
        return 77
    wrong = []

    def report(what: str, folder: Path) -> None:
        curve, weights = difference(folder, work / "alone")
        print(f"{what}: loss curve within {curve:.1e}, weights within {weights:.1e} of one process", flush=True)
        if max(curve, weights) > 1e-12 or torn(folder):
            wrong.append(what)

    def stopped(what: str, folder: Path, begun: float, codes: list[int]) -> None:
        print(f"{what}: ended after {time.monotonic() - begun:.1f} s, exit codes {codes}; torn: {torn(folder)}")
        print(
            *(f"    {host}: {line[:230]}" for host, line in zip(HOSTS, said(folder), strict=True)), sep="\n", flush=True
        )

    with tempfile.TemporaryDirectory(prefix="two_hosts_") as name:
        work = Path(name)
        folders = {what: work / what for what in ("alone", "both", "cable", "worker", "host")}
        for folder in folders.values():
            folder.mkdir()
        try:
            begun = time.monotonic()
            alone(folders["alone"], epochs)
            print(f"one process: {time.monotonic() - begun:.1f} s", flush=True)

            begun = time.monotonic()
            codes = end(start(folders["both"], epochs))
            print(f"two hosts: {time.monotonic() - begun:.1f} s, exit codes {codes}")
            report("two hosts", folders["both"])

            running = start(folders["cable"], epochs)
            wait_for_steps(folders["cable"], 10)
            begun = time.monotonic()
            ip("-n", HOSTS[1], "link", "set", "cable0", "down")
            stopped("cable pulled", folders["cable"], begun, end(running))
            connect()
            end(start(folders["cable"], epochs))
            report("cable pulled, gone on", folders["cable"])

            running = start(folders["worker"], epochs, restarts=2)
            wait_for_steps(folders["worker"], 10)
            os.kill(children(running[1].pid)[0], signal.SIGKILL)
            begun = time.monotonic()
            codes = end(running)
            print(f"worker killed, restarted by torchrun: {time.monotonic() - begun:.1f} s, exit codes {codes}")
            report("worker killed, restarted by torchrun", folders["worker"])

            running = start(folders["host"], epochs)
            wait_for_steps(folders["host"], 10)
            begun = time.monotonic()
            kill(running[1])
            stopped("host killed", folders["host"], begun, end(running))
            end(start(folders["host"], epochs))
            report("host killed, gone on", folders["host"])
        finally:
            disconnect()
    print(f"failed: {', '.join(wrong)}" if wrong else "all cases passed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
