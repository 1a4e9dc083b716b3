"""Kill training with SIGKILL at random moments, resume it on other processes, and show that nothing was lost.

    python scripts/lab/kill.py              # kills 50 runs with 2 processes: about 10 minutes on 2 cores
    python scripts/lab/kill.py --kills 6
    python scripts/lab/kill.py --shards     # the data is in shards, and a cache holds half of them

A chain is a sequence of runs on the digits, in float64, with dropout and a short last batch. All processes of a run are
killed in a step, while a checkpoint is written, or in validation. The same command then goes on, with another number of
processes, micro-batch size and number of workers. Only the last run of a chain ends by itself. In every third chain the
number of processes and the micro-batch size stay the same. Each chain is compared with an uninterrupted run:

- each step trains on the same examples in the same order, also when it is repeated, and no step is left out;
- each validation takes place, and measures the same loss;
- last and best weights are equal: bit for bit with the same processes and micro-batches, to 1e-10 with others;
- after each kill every checkpoint can be read, and training goes on from the step of `last.ckpt`.

Exits with 1 if any of this fails, and then keeps the folder of the runs.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kill_trace import (
    BATCH_SIZE,
    PHASES,
    Report,
    check,
    check_passes,
    follow,
    is_writing,
    look_at_checkpoints,
    read_weights,
    table,
    what_was_hit,
)

from batchwise.sources.digits import Digits
from batchwise.sources.shard_writing import write_shards

LAB = Path(__file__).resolve().parent
CONFIGS = (LAB / "digits.yaml", LAB / "csv.yaml")
EPOCHS, SAVE_EVERY, VALIDATE_EVERY = 4, 3, 5
TIMEOUT = 120.0  # seconds
HALT = threading.Event()


@dataclass(frozen=True)
class Run:
    """A run of a chain. With a `phase`, it is killed after `steps` steps, at the share `delay` of that phase."""

    processes: int = 2
    micro_batch_size: int | None = 17
    num_workers: int = 0
    phase: str | None = None
    steps: int = 0
    delay: float = 0.0


def make_chain(choice: random.Random, kills: int, processes: list[int], same: bool) -> list[Run]:
    """Draw `kills` runs to kill, at least every second with two processes, and a last one that ends by itself."""
    runs = [Run()]
    while len(runs) <= kills:
        run = replace(runs[-1], num_workers=choice.choice((0, 0, 1, 2)))
        if not same:
            count = choice.choice(processes) if run.processes == 2 else 2
            run = replace(run, processes=count, micro_batch_size=choice.choice((None, 7, 17, 30, 50)))
        if same or run != runs[-1]:
            runs.append(run)
    phases = [phase for _ in runs for phase in choice.sample(sorted(PHASES), len(PHASES))]
    for number, phase in enumerate(phases[:kills]):
        runs[number] = replace(runs[number], phase=phase, steps=choice.randint(0, 5), delay=choice.random())
    return runs


def start(run: Run, folder: Path, trace: str, popen: Any, data: dict[str, Any]) -> Any:
    """Start `python -m batchwise fit ... --ckpt_path last` as a process group of its own."""
    last = {"class_path": "batchwise.callbacks.checkpoint.Last", "init_args": {"every_n_steps": SAVE_EVERY}}
    trainer = {
        "default_root_dir": str(folder / "runs"),
        "precision": "64-true",
        "max_epochs": EPOCHS,
        "val_check_interval": VALIDATE_EVERY,
        "devices": run.processes,
        "strategy": "ddp" if run.processes > 1 else "auto",
        "callbacks": [last, {"class_path": "kill_trace.Trace", "init_args": {"path": trace}}],
    }
    sizes = {"batch_size": BATCH_SIZE, "micro_batch_size": run.micro_batch_size, "num_workers": run.num_workers}
    overlay = Path(f"{trace}.yaml")
    source = data | {"init_args": sizes | data.get("init_args", {})}
    overlay.write_text(json.dumps({"trainer": trainer, "data": source}))
    command = [sys.executable, "-m", "batchwise", "fit", "--ckpt_path", "last"]
    command += [word for file in (*CONFIGS, overlay) for word in ("--config", str(file))]
    path = os.pathsep.join(filter(None, [str(LAB), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with open(f"{trace}.log", "wb") as log:
        output = {"stdout": log.fileno(), "stderr": log.fileno()}
        return popen(command, **output, env=environment, cwd=folder, process_group=0)


def wait(process: Any, condition: Callable[[], bool] = lambda: False) -> bool:
    """Wait until the condition holds, the process has ended or the time is over; return whether the condition holds."""
    deadline = time.monotonic() + TIMEOUT
    while not (met := condition()) and process.poll() is None and time.monotonic() < deadline and not HALT.is_set():
        time.sleep(0.0005)
    return met


def wait_for_moment(run: Run, process: Any, trace: str) -> int:
    """Wait until the run is to be killed; return the time at which its steps were done, in nanoseconds since 1970."""
    file = Path(f"{trace}.0")

    def count(event: str) -> int:
        return file.read_bytes().count(b'{"%s"' % event.encode()) if file.exists() else 0

    if not wait(process, lambda: count("folder") == 1 and count("step") >= run.steps):
        return 0
    now, validations = time.time_ns(), count("validating")
    if run.phase == "write":
        wait(process, lambda: is_writing(trace, now))
    elif run.phase == "validation":
        wait(process, lambda: count("validating") > validations)
    time.sleep(run.delay * PHASES[str(run.phase)])
    return now


def run_chain(runs: list[Run], folder: Path, popen: Any, data: dict[str, Any]) -> Report:
    """Run a chain in a new folder; return its report, which has not been compared with the uninterrupted run yet."""
    folder.mkdir()
    report, trace = Report(), ""
    for number, run in enumerate(runs):
        if HALT.is_set():
            break
        trace, first = str(folder / f"{number}"), look_at_checkpoints(folder, report)
        report.afresh += number > 0 and first == 0
        process, now = start(run, folder, trace, popen, data), 0
        try:
            if run.phase is None:
                wait(process)
            else:
                now = wait_for_moment(run, process, trace)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the process leads a group of its own
            code = process.wait()
        if code != (0 if run.phase is None else -signal.SIGKILL):
            raise RuntimeError(f"{trace}.log: ended with code {code}\n{Path(f'{trace}.log').read_text()[-2000:]}")
        if run.phase is not None:
            report.kills[what_was_hit(trace, now), run.processes] += 1
        follow(report, trace, run.processes, first, killed=run.phase is not None)
    report.weights = read_weights(trace)
    return report


def in_shards(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the digits as shards; return them as data in memory, and as shards with a cache that holds half of them."""
    digits = Digits(batch_size=BATCH_SIZE)
    index = write_shards(digits, folder / "shards", 0.004)
    files = sorted(shard.size for shard in index.of("train"))
    window = {"class_path": "batchwise.batching.shards.BlockShuffled", "init_args": {"window": len(files) // 5}}
    given = {"path": str(folder / "shards"), "inputs": "inputs", "target": "targets", "order": window}
    cached = {"cache": str(folder / "cache"), "cache_gib": sum(files) / 2 / 2**30}
    return (
        {"class_path": "kill_trace.Whole", "init_args": given},
        {"class_path": "kill_trace.Sharded", "init_args": given | cached},
    )


def torture(
    chains: list[list[Run]], folder: Path, jobs: int = 2, popen: Any = subprocess.Popen, shards: bool = False
) -> list[Report]:
    """Run the uninterrupted run and the chains, `jobs` at a time; return their reports.

    Args:
        chains: the runs of each chain.
        folder: an existing folder, for a sub-folder per chain.
        jobs: chains at a time.
        popen: starts a process; the tests have a quicker one than `subprocess.Popen`.
        shards: the data is in shards, and for the uninterrupted run in memory.
    """
    HALT.clear()
    source = {"class_path": "kill_trace.Source"}
    whole, data = in_shards(folder) if shards else (source, source)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            reference = pool.submit(run_chain, [Run()], folder / "uninterrupted", popen, whole)
            running = [
                pool.submit(run_chain, runs, folder / f"chain_{i}", popen, data) for i, runs in enumerate(chains)
            ]
            reports = [reference.result(), *(chain.result() for chain in running)]
        except BaseException:
            HALT.set()  # the chains then kill their processes and end
            raise
    check_passes(reports[0])
    for report, runs in zip(reports[1:], chains, strict=True):
        check(report, reports[0], same=len({(run.processes, run.micro_batch_size) for run in runs}) == 1)
    return reports


def main() -> int:
    """Draw chains until enough runs with two processes are killed; print a table."""
    parser = argparse.ArgumentParser(description="Kill training, resume it, and show that nothing was lost.")
    parser.add_argument(
        "--kills",
        type=int,
        default=50,
        help="kills of runs with 2 processes; runs with other numbers are killed besides",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2, 3], help="numbers of processes to go on with after a kill"
    )
    parser.add_argument("--shards", action="store_true", help="the data is in shards")
    parser.add_argument("--jobs", type=int, default=2, help="chains at a time")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    choice, chains, planned = random.Random(arguments.seed), [], 0
    while planned < arguments.kills:
        chains.append(make_chain(choice, 4, arguments.processes, same=len(chains) % 3 == 2))
        planned += sum(run.phase is not None and run.processes == 2 for run in chains[-1])
    folder, begun = Path(tempfile.mkdtemp(prefix="kill_")), time.monotonic()
    reports = torture(chains, folder, arguments.jobs, shards=arguments.shards)
    print(table(reports, time.monotonic() - begun))
    violations = [violation for report in reports for violation in report.violations]
    if violations:
        print(*violations, f"the runs are in {folder}", sep="\n", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
