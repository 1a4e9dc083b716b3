"""All that can only be measured on a GPU, in the order of its worth, within a budget of time.

Each section begins while there is time, prints its tables as Markdown, and is kept in the JSON file at once. An error
ends a row or a section, and the rest goes on.

- step: microseconds per step of a plain loop, ours, ours captured, and Lightning as documented.
- idle: the share of the time in which the GPU runs no kernel, and how often the host waits for it.
- feed: examples per second, from the device and from the host.
- memory: bytes per example, whether the largest micro-batch is found, and whether a batch that does not fit is cut.
- target: seconds to an accuracy, of a recipe in the style of the CIFAR-10 speed records.
- compiled: step and target with a compiled network. Compiling takes long, so it comes last.

    python scripts/lab/bench_gpu.py --json bench.json
    python scripts/lab/bench_gpu.py --device cpu --tiny
"""

import argparse
import contextlib
import gc
import io
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import bench
import cifar10
import lightning
import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from bench_step import Documented, adamw, mlp
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from batchwise.batching.fetch import Fetch, make_fetch
from batchwise.batching.loader import MicroBatch, TrainLoader
from batchwise.batching.order import Shuffled
from batchwise.batching.plan import BatchPlan
from batchwise.choosing.fits import free_memory, what_fits
from batchwise.choosing.speed import Stopwatch, Way
from batchwise.data import pixels as change
from batchwise.data.augment import CutOut, Flip, ShiftCrop
from batchwise.data.module import DataModule
from batchwise.host import peak_memory, reset_peak_memory, wait_for
from batchwise.models.compiled import compile_network
from batchwise.models.convnet import ConvNet
from batchwise.models.resnet import ResNet
from batchwise.models.transformer import Transformer
from batchwise.optim.schedule import Schedule
from batchwise.sources.digits import read_digits
from batchwise.tasks.classification import Classification
from batchwise.tasks.language import Language
from batchwise.tasks.memory import is_out_of_memory
from batchwise.trainer import Trainer

Row = dict[str, Any]
PLAIN, OURS, CAPTURED = "plain PyTorch loop", "ours", "ours, captured"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
COPY = "Memcpy DtoH"
GIB = 2**30
COMPILING = 90.0
"""Seconds that compiling a network may take on a machine that has never done it."""


@dataclass
class Setting:
    """What the command line has asked for."""

    device: torch.device
    tiny: bool
    end: float
    said: set[str] = field(default_factory=set)
    """What a trainer has said about capturing."""

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.perf_counter()

    def wait(self) -> None:
        """Wait for the device."""
        wait_for(self.device)

    def autocast(self, precision: str) -> Any:
        """Return the context of a forward pass in a plain loop."""
        return torch.autocast(self.device.type, torch.bfloat16) if precision == "bf16-mixed" else nullcontext()


@dataclass
class Case:
    """A network, its data on the host, and its batch."""

    title: str
    make: Callable[..., nn.Module]
    inputs: Tensor
    targets: Tensor
    batch_size: int
    precision: str
    steps: int
    not_timed: int

    def timer(self, given: Setting, profile: Any = None) -> "Timer":
        """Return a timer of this case's steps."""
        return Timer(given, self.not_timed, self.steps, profile)

    def task(self) -> Classification | Language:
        """Return a task with a new network."""
        torch.manual_seed(0)
        if self.targets.ndim == 2:
            return Language(self.make(), optimizer=adamw, sample_length=0)
        return Classification(self.make(), optimizer=adamw)


class Timer:
    """Times the steps after the warm-up, of any loop that calls `begin` where a step begins. It waits for the device.

    Args:
        given: has the device.
        not_timed: steps of the warm-up.
        steps: steps that are timed.
        profile: records the timed steps.
    """

    def __init__(self, given: Setting, not_timed: int, steps: int, profile: Any = None) -> None:
        self.given, self.ends, self.steps, self.profile = given, (not_timed, not_timed + steps), steps, profile
        self.step, self.times = -1, []

    def begin(self) -> None:
        """Count a step that begins."""
        self.step += 1
        if self.step not in self.ends:
            return
        self.given.wait()
        if self.step == self.ends[0] and self.profile:
            self.profile.start()
        self.times.append(time.perf_counter())
        if self.step == self.ends[1] and self.profile:
            self.profile.stop()

    @property
    def last(self) -> int:
        """Number of the first step that is not timed any more."""
        return self.ends[1]

    @property
    def seconds(self) -> float:
        """Seconds of all timed steps."""
        return self.times[1] - self.times[0]

    @property
    def microseconds(self) -> float:
        """Microseconds per timed step."""
        return self.seconds / self.steps * 1e6


# The loops


class Plain:
    """A careful user's loop, with the data on the device. The network stays from run to run, so it compiles once."""

    def __init__(self, given: Setting, case: Case, compiled: bool = False) -> None:
        self.given, self.case, self.compiled = given, case, compiled
        self.network: Any = None

    def __call__(self, timer: Timer | None = None) -> float:
        """Return microseconds per step."""
        given, case, timer = self.given, self.case, timer or self.case.timer(self.given)
        if self.network is None:
            self.network = case.make().to(given.device)
            self.inputs, self.targets = case.inputs.to(given.device), case.targets.to(given.device)
            self.optimizer = adamw(self.network.parameters())
            if self.compiled:
                compile_network(self.network, given.device)
        for index in shuffled(len(self.inputs), case.batch_size, given.device):
            timer.begin()
            if timer.step == timer.last:
                break
            step(given, case, self.network, self.optimizer, self.inputs, self.targets, index)
        check_compiled(self.compiled)
        return timer.microseconds


def shuffled(examples: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the examples of whole batches, epoch after epoch, without end."""
    while True:
        yield from torch.randperm(examples, device=device).split(batch_size)[: examples // batch_size]


def step(
    given: Setting, case: Case, network: nn.Module, optimizer: Any, inputs: Tensor, targets: Tensor, index: Tensor
) -> None:
    """Make one step of the plain loop."""
    optimizer.zero_grad()
    batch, wanted = floats(inputs.index_select(0, index)), targets.index_select(0, index)
    with given.autocast(case.precision):
        logits = network(batch)
        loss = F.cross_entropy(logits.flatten(0, -2), wanted.flatten())
    loss.backward()
    optimizer.step()


def floats(inputs: Tensor) -> Tensor:
    """Convert bytes to floats from 0 to 1; tokens stay."""
    return inputs.float().mul_(1 / 255) if inputs.dtype == torch.uint8 else inputs


class Counted(Callback):
    """Tells a timer of each step, before the hooks of Lightning's, of which one that is heard slows the step."""

    def __init__(self, timer: Timer) -> None:
        self.timer = timer

    def before_step(self, *_: Any) -> None:
        """Begin a step."""
        self.timer.begin()


class Data(DataModule):
    """The examples of a case."""

    def __init__(self, case: Case, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.case = case

    def load(self, split: str) -> Any:
        """Return the training split alone."""
        return (self.case.inputs, self.case.targets) if split == "train" else None

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        """Convert bytes to floats from 0 to 1."""
        return replace(batch, inputs=floats(batch.inputs))


def fit(given: Setting, task: Any, data: DataModule, precision: str, max_steps: int, **settings: Any) -> str:
    """Train with ours: a CSV log, and each step checked for finite numbers. Return what it printed."""
    said = io.StringIO()
    settings = {"log_every_n_steps": 50, **settings}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said):
        trainer = Trainer(
            max_steps=max_steps,
            accelerator=given.device.type,
            devices=1,
            precision=precision,
            logger=CSVLogger(folder),
            enable_progress_bar=False,
            enable_checkpointing=False,
            default_root_dir=folder,
            **settings,
        )
        trainer.fit(task, datamodule=data)
    for line in said.getvalue().splitlines():
        if "captur" in line and line not in given.said:  # such as why it was not done
            given.said.add(line)
            print(line, flush=True)
    return said.getvalue()


def ours(given: Setting, case: Case, timer: Timer | None = None, **settings: Any) -> float:
    """Return microseconds per step of ours."""
    timer = timer or case.timer(given)
    data = Data(case, batch_size=case.batch_size, drop_last=True, seed=0)
    fit(given, case.task(), data, case.precision, timer.last + 1, callbacks=[Counted(timer)], **settings)
    check_compiled(settings.get("compile", False))
    return timer.microseconds


def check_compiled(asked: bool) -> None:
    """Raise RuntimeError if a network was to be compiled, but no graph was."""
    if asked and not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
        raise RuntimeError("nothing was compiled")


def documented(given: Setting, case: Case) -> float:
    """Return microseconds per step of Lightning with a DataLoader and `self.log`."""
    timer = Timer(given, case.not_timed // 3, max(2, case.steps // 3))
    loader = DataLoader(
        TensorDataset(case.inputs, case.targets),
        case.batch_size,
        shuffle=True,
        pin_memory=given.device.type == "cuda",
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=timer.last + 1,
            accelerator=given.device.type,
            devices=1,
            precision=case.precision,  # type: ignore[arg-type]
            logger=CSVLogger(folder),
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=folder,
        )
        trainer.fit(Documented(case.make(), timer), loader)  # type: ignore[arg-type]
    return timer.microseconds


class Whole(nn.Module):
    """A network that `Module.compile` compiles, unlike a bare `nn.Sequential`."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = make()

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply all layers."""
        return self.layers(inputs)


def cases(given: Setting) -> list[Case]:
    """Return the four networks."""
    tiny = given.tiny
    torch.manual_seed(0)
    grey = torch.randint(0, 256, (400 if tiny else 60_000, 784), dtype=torch.uint8)
    colour = torch.randint(0, 256, (64 if tiny else 40_960, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.randint(0, 257, (64 if tiny else 12_800, 9 if tiny else 129))
    digits, classes = (torch.randint(0, 10, (len(images),)) for images in (grey, colour))
    convnet = partial(ConvNet, channels=(4, 4) if tiny else (32, 64))
    resnet = partial(ResNet, channels=(4, 8, 8, 8) if tiny else (64, 128, 256, 256))
    transformer = partial(Transformer, 257, *((16, 1, 2) if tiny else (256, 4, 4)))
    sizes, lengths = ((8, 8, 8, 8), (3, 3, 3, 3)) if tiny else ((64, 128, 512, 64), (300, 200, 100, 100))
    images = grey.view(-1, 1, 28, 28)
    rows = [
        ("MLP 784-256-10", mlp, grey, digits, "32-true"),
        ("ConvNet, 28 x 28", convnet, images, digits, "32-true"),
        ("ResNet, 32 x 32", resnet, colour, classes, "bf16-mixed"),
        ("transformer, 128 tokens", transformer, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), "bf16-mixed"),
    ]
    return [
        Case(f"{row[0]}, batch {size}, {row[4]}", *row[1:4], size, row[4], length, 3 if tiny else 60)  # type: ignore[arg-type]
        for row, size, length in zip(rows, sizes, lengths, strict=True)
    ]


# Measuring and printing


def rounds(given: Setting, alternatives: dict[str, Callable[[], float]], number: int = 5) -> dict[str, Row]:
    """Run each alternative once per round, after a warm-up round, while there is time. The first is the base.

    Returns:
        For each the median, and the median over the rounds of the ratio to the base; or the error.
    """
    measured: dict[str, list[float]] = {name: [] for name in alternatives}
    errors: dict[str, str] = {}
    number = 0 if given.tiny else number
    for turn in range(number + 1):
        if turn > 1 and given.left < 0:
            break
        for name, run in alternatives.items():
            if name not in errors:
                try:
                    value = run()
                    if turn or not number:
                        measured[name].append(value)
                except Exception as error:
                    errors[name] = failure(name, error)
    base = measured[next(iter(alternatives))]
    found: dict[str, Row] = {}
    for name, values in measured.items():
        if name in errors or not values:
            found[name] = {"error": errors.get(name, "no time left")}
            continue
        ratios = [a / b for a, b in zip(values, base, strict=False)]
        found[name] = {
            "median": statistics.median(values),
            "ratio": statistics.median(ratios) if ratios else None,
            "rounds": len(values),
        }
    return found


def failure(name: str, error: Exception) -> str:
    """Print a traceback; return the error in one line."""
    print(f"\n{name}:\n{''.join(traceback.format_exception(error))}", flush=True)
    return f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"


def table(title: str, rows: dict[str, Row]) -> None:
    """Print a Markdown table with a line for each row."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row if name != "error"))
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}")
    for name, row in rows.items():
        cells = [row["error"].replace("|", "/")] if "error" in row else [shown(row.get(column)) for column in columns]
        print(f"| {name} | {' | '.join(cells + [''] * (len(columns) - len(cells)))} |")
    print(flush=True)


def shown(value: Any) -> str:
    """Return a number with at least three digits."""
    if not isinstance(value, float | int) or isinstance(value, bool):
        return "-" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.3g}"


# The sections


def steps(given: Setting, keep: Callable[[dict], None]) -> None:
    """Measure the step of each network."""
    found = {}
    for number, case in enumerate(cases(given)):
        if found and given.left < 0:
            print(f"{case.title}: no time left")
            break
        alternatives = {PLAIN: Plain(given, case), OURS: partial(ours, given, case)}
        alternatives[CAPTURED] = partial(ours, given, case, capture="auto")
        if number < 2:
            alternatives["Lightning as documented"] = partial(documented, given, case)
        found[case.title] = rounds(given, alternatives, 5 if number < 2 else 3)
        table(f"{case.title}: microseconds per step", found[case.title])
        keep(found)


def compiled(given: Setting, keep: Callable[[dict], None]) -> None:
    """Measure the step of compiled networks."""
    found = {}
    chosen = cases(given)
    small = replace(chosen[0], make=partial(Whole, mlp))
    for case in [small] if given.tiny else [small, chosen[2]]:
        if not given.tiny and given.left < (COMPILING if found else COMPILING / 2):
            print(f"{case.title}: no time left")
            found[case.title] = {case.title: {"error": "no time left"}}
            keep(found)
            continue
        alternatives = {
            PLAIN: Plain(given, case),
            f"{PLAIN}, compiled": Plain(given, case, compiled=True),
            "ours, compiled": partial(ours, given, case, compile=True),
        }
        found[case.title] = rounds(given, alternatives, 3)
        table(f"{case.title}: microseconds per step", found[case.title])
        keep(found)
    if not given.tiny and given.left > COMPILING:
        target(given, lambda figures: keep({**found, "target": figures}), COMPILED)


def idle(given: Setting, keep: Callable[[dict], None]) -> None:
    """Profile steps without a row in the log."""
    activity = torch.profiler.ProfilerActivity
    kind = activity.CUDA if given.device.type == "cuda" else activity.CPU
    with torch.profiler.profile(activities=[kind]):  # the first one takes long, and sees no graph from before
        torch.ones(1, device=given.device).add_(1)
        given.wait()
    found: dict[str, dict[str, Row]] = {}
    for case in (each for number, each in enumerate(cases(given)) if number in (0, 2)):
        rows = found[case.title] = {}
        case = replace(case, steps=3 if given.tiny else 200)
        without_rows = partial(ours, given, case, log_every_n_steps=10**6)
        alternatives = {PLAIN: Plain(given, case), OURS: without_rows}
        alternatives[CAPTURED] = partial(without_rows, capture="auto")
        for name, run in alternatives.items():
            profile = torch.profiler.profile(activities=[kind])
            timer = case.timer(given, profile)
            try:
                run(timer=timer)
                rows[name] = profiled(given, profile, timer)
            except Exception as error:
                rows[name] = {"error": failure(name, error)}
            keep(found)
        table(f"{case.title}: {case.steps} profiled steps", rows)


def profiled(given: Setting, profile: Any, timer: Timer) -> Row:
    """Return the share of the time without a kernel, and the waits and copies to the host per step."""
    row: Row = {"microseconds per step": timer.microseconds, "idle share": None, "kernels per step": None}
    row |= {"host waits per step": None, "copies to the host per step": None}
    if given.device.type != "cuda":
        return row
    events = profile.profiler.kineto_results.events()
    names: dict[str, int] = {}
    spans = []
    for event in events:
        name = event.name()
        if event.device_type().name == "CUDA":
            if name.startswith(("Memcpy", "Memset", "Optimizer.", "ProfilerStep")):
                names[name] = names.get(name, 0) + 1
            else:
                spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
        elif name.startswith("cuda"):
            names[name] = names.get(name, 0) + 1
    busy, until = 0, 0
    for start, stop in sorted(spans):
        busy += max(0, stop - max(start, until))
        until = max(until, stop)
    per_step = {name: round(number / timer.steps, 1) for name, number in names.items()}  # less the profiler's own
    return row | {
        "idle share": 1 - busy / 1e9 / timer.seconds,
        "kernels per step": len(spans) / timer.steps,
        "host waits per step": sum(per_step.get(name, 0.0) for name in WAITS),
        "copies to the host per step": sum(number for name, number in per_step.items() if name.startswith(COPY)),
        "calls": ", ".join(f"{name} {number}" for name, number in sorted(per_step.items()) if number),
    }


def feed(given: Setting, keep: Callable[[dict], None]) -> None:
    """Measure how fast batches arrive on the device."""
    examples, sizes = (512, (16, 64)) if given.tiny else (60_000, (256, 4096))
    inputs = torch.randint(0, 256, (examples, 784), dtype=torch.uint8)
    targets = torch.randint(0, 10, (examples,))
    there, device = [field.to(given.device) for field in (inputs, targets)], given.device
    found = {}
    for size in sizes:
        fetch: Any = make_fetch((inputs, targets))
        workers = DataLoader(
            TensorDataset(inputs, targets),
            size,
            shuffle=True,
            num_workers=1 if given.tiny else 4,
            pin_memory=device.type == "cuda",
            persistent_workers=True,
        )

        def gathered(size: int = size) -> Iterator[Any]:
            for index in torch.randperm(examples, device=device).split(size):
                yield [field.index_select(0, index) for field in there]

        def loaded(workers: DataLoader = workers) -> Iterator[Any]:
            for fields in workers:
                yield [field.to(device, non_blocking=True) for field in fields]

        alternatives = {
            "bare index_select loop on the device": gathered,
            "ours, on the device": batches(given, fetch.on(device, 1.0), size),
            "ours, from pinned memory": batches(given, fetch.on(device, 0.0), size),
            f"DataLoader, {workers.num_workers} workers": loaded,
        }
        title = f"batch {size}"
        runs = {name: partial(speed, given, run, examples) for name, run in alternatives.items()}
        found[title] = rounds(given, runs, 3)
        table(f"{title}: examples per second", found[title])
        keep(found)


def batches(given: Setting, fetch: Fetch, size: int) -> Callable[[], Iterable[Any]]:
    """Return a run over one epoch of the training loader, with each batch moved to the device."""
    plan, epoch = BatchPlan(len(fetch), size), count()
    order = Shuffled().prepare(len(fetch), size, seed=0)

    def run() -> Iterator[Any]:
        for batch in TrainLoader(plan, order, fetch, 0, lambda: next(epoch) * plan.steps_per_epoch):
            for part in batch.micro_batches:
                yield part.to(given.device)

    return run


def speed(given: Setting, run: Callable[[], Iterable[Any]], examples: int) -> float:
    """Return examples per second over an epoch. The round of warm-up has started threads and processes."""
    given.wait()
    start = time.perf_counter()
    for _ in run():
        pass
    given.wait()
    return examples / (time.perf_counter() - start)


def memory(given: Setting, keep: Callable[[dict], None]) -> None:
    """Measure the memory of micro-batches, and look for the largest one within a budget of 8 GiB."""
    case, cuda, device = cases(given)[2], given.device.type == "cuda", given.device
    # With a norm that does not depend on how a batch is cut, and few images, which are on the device too.
    case = replace(case, make=partial(case.make, norm="group"), inputs=case.inputs[:2048], targets=case.targets[:2048])
    found: dict[str, Any] = {}
    sizes = (4, 8, 16) if given.tiny else (128, 512, 2048, 8192)
    peaks = {size: train_once(given, case, size) for size in sizes}
    slope, fixed = np.polyfit([float(size) for size in sizes], [float(peak) for peak in peaks.values()], 1)
    rows: dict[str, Row] = {
        str(size): {"peak, MiB": peak / 2**20, "line, MiB": (slope * size + fixed) / 2**20}
        for size, peak in peaks.items()
    }
    found["peak"] = rows
    found["line"] = {"bytes per example": slope, "bytes besides": fixed}
    table("ResNet, bf16-mixed: memory at the peak, by the examples in a micro-batch", rows)
    print(f"line: {slope / 2**20:.3f} MiB per example and {fixed / 2**20:.0f} MiB besides")
    keep(found)
    most = 32 if given.tiny else 2**15
    try:
        if cuda:
            release()
            torch.cuda.set_per_process_memory_fraction(
                8 * GIB / torch.cuda.get_device_properties(device).total_memory, device
            )
        data = Data(case, batch_size=case.batch_size, seed=0)
        watch = Stopwatch(case.task(), data, most, device, rounds=1)
        fitting = list(what_fits(watch, Way(1, case.precision), most, free_memory(device, 1), 1))
        largest = max(size.examples for size in fitting)
        del watch
        release()
        true = largest_that_fits(given, case, most) if cuda else None
        found["largest"] = {
            "found": {"examples": largest, "ratio": largest / true if true else None},
            "true, to 5 percent": {"examples": true, "ratio": 1.0 if true else None},
        }
        table("ResNet, bf16-mixed: the largest micro-batch within 8 GiB", found["largest"])
        keep(found)
        found["halved"] = halved(given, case, 2 * true) if true else None
        print(f"a micro-batch of twice as many: {found['halved'] or 'needs a GPU'}")
        keep(found)
    finally:
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def train_once(given: Setting, case: Case, size: int) -> int:
    """Return the bytes at the peak of two plain steps."""
    release()
    network = case.make().to(given.device)
    optimizer = adamw(network.parameters())
    inputs, targets = case.inputs.to(given.device), case.targets.to(given.device)
    reset_peak_memory(given.device)
    for _ in range(2):
        index = torch.arange(size, device=given.device) % len(inputs)
        step(given, case, network, optimizer, inputs, targets, index)
    given.wait()
    return peak_memory(given.device)


def release() -> None:
    """Give memory that is free back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def largest_that_fits(given: Setting, case: Case, most: int) -> int:
    """Return the most examples whose step fits, by doubling and then by bisection to 5 percent."""

    def fits(size: int) -> bool:
        try:
            train_once(given, case, size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    size = 64
    while 2 * size <= most and fits(2 * size):
        size *= 2
    low, high = size, 2 * size
    while high - low > 0.05 * low:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def halved(given: Setting, case: Case, size: int) -> Row:
    """Train with micro-batches that do not fit. Return the lines that say so, and the size that went on."""
    release()
    many = -(-size // len(case.inputs))
    case = replace(case, inputs=torch.cat([case.inputs] * many), targets=torch.cat([case.targets] * many))
    data = Data(case, batch_size=size, seed=0, resident_share=0.0)
    task = case.task()
    said = fit(given, task, data, case.precision, 3)
    lines = [line for line in said.splitlines() if "out of memory" in line]
    return {"asked": size, "went on with": data.micro_batch_limit, "said": lines, "steps": task.trainer.global_step}


class Pictures(cifar10.CIFAR10):
    """Images of 32 x 32 pixels in 10 classes. Validation is on the test images."""

    def __init__(self, found: dict[str, tuple[Tensor, Tensor]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.found = found

    def load(self, split: str) -> Any:
        """Return images uint8 [N, 3, 32, 32] and class numbers int64 [N]."""
        return self.found["train" if split == "train" else "test"]


class Reach(pl.Callback):
    """Stops when the validation accuracy has reached a target, and notes the time."""

    def __init__(self, given: Setting, target: float) -> None:
        self.given, self.target = given, target
        self.start, self.best, self.steps, self.seconds, self.first = time.perf_counter(), 0.0, 0, 0.0, (0, 0.0)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the accuracy."""
        self.given.wait()
        self.seconds, self.steps = time.perf_counter() - self.start, trainer.global_step
        self.first = self.first if self.first[0] else (self.steps, self.seconds)
        self.best = max(self.best, float(trainer.callback_metrics["val/accuracy"]))
        trainer.should_stop = self.best >= self.target

    def row(self) -> Row:
        """Return the figures. The time per step is that after the first epoch, validations included."""
        later = self.steps - self.first[0]
        return {
            "accuracy": self.best,
            "reached": self.best >= self.target,
            "steps": self.steps,
            "seconds": self.seconds,
            "ms per step": (self.seconds - self.first[1]) / later * 1e3 if later else None,
        }


FAST = {"precision": "bf16-mixed", "channels_last": True}
WAYS: dict[str, dict[str, Any]] = {
    "ours, float32": {"precision": "32-true"},
    "ours, bf16-mixed, channels_last": FAST,
    "the same, captured": {**FAST, "capture": "auto"},
}
COMPILED = {"ours, bf16-mixed, channels_last, compiled": {**FAST, "compile": True}}


def target(given: Setting, keep: Callable[[dict], None], ways: dict[str, dict[str, Any]] = WAYS) -> None:
    """Train to an accuracy, in ways that cost more and more to start and less and less per step."""
    folder = Path("data/cifar10")
    archive = (
        None if given.tiny else next((path for name in cifar10.ARCHIVES if (path := folder / name).exists()), None)
    )
    name, goal, epochs = ("CIFAR-10", 0.93, 16) if archive else ("painted digits", 0.985, 2 if given.tiny else 10)
    pictures = cifar10.read(archive) if archive else painted(*((256, 64) if given.tiny else (20_000, 5_000)))
    augment = [Flip(alternate=True), ShiftCrop(4), CutOut(8)] if archive else [ShiftCrop(2)]
    size, channels = (64, (4, 8, 8, 8)) if given.tiny else (512, (64, 128, 256, 256))

    def train(precision: str, max_epochs: int = epochs, **settings: Any) -> Row:
        torch.manual_seed(0)
        task = Classification(
            ResNet(channels=channels),
            optimizer=partial(torch.optim.SGD, lr=0.4, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True),
            reference_batch_size=512,
            schedule=Schedule("linear", warmup=0.2),
            decay_matrices_only=True,
            label_smoothing=0.2,
        )
        data = Pictures(pictures, batch_size=size, augment=augment, seed=0)
        reach = Reach(given, goal)
        fit(given, task, data, precision, -1, max_epochs=max_epochs, callbacks=[reach], **settings)
        return reach.row()

    train("32-true", 1)  # the first run of a process starts the libraries
    rows: dict[str, Row] = {}
    for way, settings in ways.items():
        try:
            rows[way] = train(**settings) if given.left > 0 else {"error": "no time left"}
        except Exception as error:
            rows[way] = {"error": failure(way, error)}
        keep({"data": name, "goal": goal, "rows": rows})
    table(f"ResNet, {name}: to {goal:.1%} of the test images", rows)


def painted(*counts: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return coloured digits, uint8 [N, 3, 32, 32], and classes: as many for training and for the test as given.

    Training and test are made from different scans of scikit-learn's digits. Each image has a shift of up to 3 pixels,
    two colours and noise of its own. The same images come out each time.
    """
    generator = torch.Generator().manual_seed(0)
    scans, digits = read_digits()
    large = F.interpolate(scans.float() / 16, size=(32, 32), mode="bilinear", align_corners=False)
    parts = torch.randperm(len(digits), generator=generator).tensor_split([len(digits) * 4 // 5])
    made = {}
    for name, part, number in zip(("train", "test"), parts, counts, strict=True):
        index = part[torch.randint(len(part), (number,), generator=generator)]
        down, right = (torch.randint(-3, 4, (number,), generator=generator) for _ in range(2))
        ink = change.shift(large[index], down, right)
        paper, pen = torch.rand(2, number, 3, 1, 1, generator=generator)
        pen = (paper + 0.5 + 0.3 * (pen - 0.5)) % 1  # far from the paper
        images = torch.lerp(paper, pen, ink) + 0.05 * torch.randn(number, 3, 32, 32, generator=generator)
        made[name] = (images.clamp(0, 1).mul(255).to(torch.uint8), digits[index])
    return made


SECTIONS: dict[str, Callable[[Setting, Callable[[dict], None]], None]] = {
    "feed": feed,
    "idle": idle,
    "step": steps,
    "memory": memory,
    "target": target,
    "compiled": compiled,
}


def main() -> None:
    """Run the sections in their order."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a few steps of tiny networks, to try the script")
    parser.add_argument("--seconds", type=float, default=300, help="no section begins after so many")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which, of: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads")
    parser.add_argument("--json", type=Path, help="file for the figures, written after every section")
    asked = bench.prepare(parser)
    unknown = set(asked.sections.split(",")) - SECTIONS.keys()
    if unknown:
        parser.error(f"--sections has {', '.join(sorted(unknown))}: write some of {', '.join(SECTIONS)}")
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but PyTorch finds no CUDA GPU: write --device cpu --tiny to try the script")
    torch.backends.cudnn.allow_tf32 = False  # which PyTorch allows for convolutions, but not for products of matrices
    device = torch.device(asked.device, 0) if asked.device == "cuda" else torch.device("cpu")
    given = Setting(device, asked.tiny, started + asked.seconds)
    machine = {**bench.machine(), "device": name_of(device), "lightning": lightning.__version__}
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    found: dict[str, dict] = {}

    def write() -> None:
        if asked.json is not None:
            asked.json.write_text(json.dumps({"machine": machine, "sections": found}, indent=2) + "\n")

    for name in asked.sections.split(","):
        if given.left < 0:
            found[name] = {"skipped": "no time left"}
            print(f"\n## {name}: no time left", flush=True)
            write()
            continue
        print(f"\n## {name}", flush=True)
        begun = time.perf_counter()
        section = found[name] = {}

        def keep(figures: dict, section: dict = section) -> None:
            section["figures"] = figures
            write()

        try:
            SECTIONS[name](given, keep)
        except Exception as error:
            section["error"] = failure(name, error)
        section["seconds"] = time.perf_counter() - begun
        print(f"{name} took {section['seconds']:.1f} s", flush=True)
        write()
        release()


def name_of(device: torch.device) -> str:
    """Return the name of the GPU, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
