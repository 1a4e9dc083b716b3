"""Steps that run out of memory or of finite numbers."""

import csv
import re
import sys
from copy import deepcopy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import small
import torch
import torch.nn.functional as F
from helpers import CSV, DIGITS, TWO, Result, furthest, run_here, run_process
from torch import nn

from batchwise.batching.loader import Batch, MicroBatch
from batchwise.callbacks.checkpoint import Last
from batchwise.data.module import DataModule
from batchwise.errors import Mistake, TrainingStopped
from batchwise.models.dropout import Dropout
from batchwise.models.norm import GhostBatchNorm
from batchwise.tasks.passes import seed_generator
from batchwise.tasks.step import Step
from batchwise.tasks.task import Task
from batchwise.trainer import Trainer

OWN = """
import torch
from torch import nn
from batchwise.sources.digits import Digits
from batchwise.models.dropout import Dropout

def out_of_memory(kind):
    if kind == "device":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nmore lines")
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

class Check(torch.autograd.Function):
    @staticmethod
    def forward(context, inputs, most, where, kind):
        context.most, context.where, context.kind = most, where, kind
        if where == "forward" and len(inputs) > most:
            out_of_memory(kind)
        return inputs.clone()

    @staticmethod
    def backward(context, gradient):
        if context.where == "backward" and len(gradient) > context.most:
            out_of_memory(context.kind)
        return gradient, None, None, None

class Fragile(nn.Module):
    def __init__(self, most: int = 10**6, where: str = "forward", kind: str = "device", norm: bool = False):
        super().__init__()
        self.first, self.last = nn.Linear(64, 32, bias=not norm), nn.Linear(32, 10)
        self.norm = nn.BatchNorm1d(32) if norm else nn.Identity()
        self.dropout = Dropout(0.2)
        self.check = most, where, kind

    def forward(self, inputs):
        hidden = self.dropout(self.norm(self.first(inputs.flatten(1))).relu())
        if self.training:
            hidden = Check.apply(hidden, *self.check)
        return self.last(hidden)

class Spoilt(Digits):
    def __init__(self, example: int = 700, since_epoch: int = 0, all_of_them: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.spoilt = example, since_epoch, all_of_them

    def transform(self, batch, training):
        batch = super().transform(batch, training)
        example, since, all_of_them = self.spoilt
        if training and batch.epoch >= since:
            wrong = torch.ones(len(batch), dtype=torch.bool) if all_of_them else batch.index == example
            batch.inputs[wrong] = torch.nan
        return batch
"""
FIT = ("fit", *DIGITS, *CSV, "--trainer.precision", "64-true", "--trainer.max_epochs", 2, "--data.batch_size", 100)


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_network.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_network", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def fragile(**settings: object) -> tuple[str, str]:
    arguments = ", ".join(f"{name}: {value}" for name, value in settings.items())
    return "--model.network", f"{{class_path: own_network.Fragile, init_args: {{{arguments}}}}}"


def errors(result: Result) -> list[str]:
    return [line for line in result.err.splitlines() if not line.startswith(("note:", "warning:"))]


# Out of memory


@pytest.mark.parametrize(("where", "kind"), [("forward", "device"), ("backward", "device"), ("backward", "host")])
@pytest.mark.slow
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(where: str, kind: str) -> None:
    result = run_here(*FIT, *fragile(most=30, where=where, kind=kind))
    assert result.code == 0, result.err
    said = [line for line in result.out.splitlines() if "out of memory" in line]
    assert said == [
        f"step 0: out of memory with micro-batches of {size} examples: the batch is run again in micro-batches of "
        f"{size // 2}; its result is the same"
        for size in (100, 50)
    ]
    assert result.checkpoint()["Digits"]["micro_batch_limit"] == 25
    whole = run_here(*FIT, *fragile(), "--name", "whole")
    cut = run_here(*FIT, *fragile(), "--data.micro_batch_size", 25, "--name", "cut")
    assert whole.checkpoint()["Digits"]["micro_batch_limit"] is None
    assert furthest(result, cut) < 1e-12
    assert furthest(result, whole) < 1e-12
    for column in ("train/loss", "train/loss_epoch", "gradient_norm", "val/loss"):
        ours, theirs = result.rows(column), whole.rows(column)
        assert ours.keys() == theirs.keys()
        assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-12


@pytest.mark.slow
def test_the_limit_is_kept_over_a_resume() -> None:
    run = (*FIT, *fragile(most=30))
    first = run_here(*run, "--trainer.max_steps", 15)
    assert first.out.count("out of memory") == 2
    on = run_here(*run, "--ckpt_path", "last", "--force", "true")
    assert on.code == 0, on.err
    assert on.folder == first.folder
    assert "out of memory" not in on.out
    assert on.checkpoint()["Digits"]["micro_batch_limit"] == 25
    assert on.checkpoint()["global_step"] == 26


@pytest.mark.parametrize("batch_size", [96, 99, 100, 101])
@pytest.mark.slow
def test_out_of_memory_keeps_ghost_batches_whole(batch_size: int) -> None:
    """A batch of 99 is eleven ghost batches of 8 and one of 11."""
    run = (*FIT, "--data.batch_size", batch_size, "--model.ghost_batch_size", 8, "--trainer.max_epochs", 1)
    # With plain SGD, because AdamW divides rounding errors by 1e-8.
    run = (*run, "--model.optimizer", "{class_path: torch.optim.SGD, init_args: {lr: 0.1}}")
    result = run_here(*run, *fragile(most=30, norm="true"))
    assert result.code == 0, result.err
    assert "out of memory" in result.out
    whole = run_here(*run, *fragile(norm="true"), "--name", "whole")
    assert furthest(result, whole) < 1e-12


@pytest.mark.parametrize(("ghost", "most", "smallest"), [((), 0, 1), (("--model.ghost_batch_size", 16), 10, 20)])
@pytest.mark.slow
def test_what_cannot_be_cut_further_stops_with_one_line(ghost: tuple, most: int, smallest: int) -> None:
    result = run_here(*FIT, *fragile(most=most, norm=str(bool(ghost)).lower()), *ghost)
    assert result.code == 1
    (line,) = errors(result)
    assert line.startswith(f"error: out of memory with {smallest} example(s) at once, which cannot be cut further")
    assert "Tried to allocate 2.00 GiB" in line
    assert "more lines" not in line


def test_another_error_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import own_network

    def fail(kind: str) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(own_network, "out_of_memory", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_here(*FIT, *fragile(most=30))


CONSTANT = ("--model.schedule", "{shape: constant, warmup_examples: 600}")


def stop_out_of_memory(batch_size: int, *arguments: object) -> tuple[Result, Path]:
    """Run on two processes, which may have up to 45 or 50 examples at once; return also the run's folder."""
    most = 50 if batch_size == 101 else 45
    run = (*FIT, *TWO, *CONSTANT, "--data.batch_size", batch_size)
    result = run_process(*run, *fragile(most=most), *arguments, timeout=60)
    assert result.code not in (0, 2)
    (line,) = {line for line in errors(result) if "out of memory with" in line}
    assert f"out of memory with micro-batches of {(batch_size + 1) // 2} examples (CUDA out of memory." in line
    assert line.endswith("the same command with --ckpt_path last goes on with 25")
    (limit,) = Path("runs/digits").glob("*/micro_batch_limit")
    assert limit.read_text() == "25"
    return result, limit.absolute().parents[0]


@pytest.mark.slow
def test_out_of_memory_on_two_processes_at_the_first_step() -> None:
    """There is no checkpoint yet."""
    steps = ("--trainer.max_steps", 4)
    stopped, folder = stop_out_of_memory(100, *steps)
    assert "Traceback" not in stopped.err
    on = run_here(*FIT, *CONSTANT, *fragile(most=45), *steps, "--ckpt_path", "last")
    assert on.code == 0, on.err
    assert "out of memory" not in on.out
    assert on.folder == folder
    assert re.search(r" micro_batch_size  25$", on.out, re.MULTILINE)


@pytest.mark.slow
def test_out_of_memory_on_one_of_two_processes_after_a_resume() -> None:
    """Of a batch of 101 the second process has 51."""
    run = (*FIT, *CONSTANT, "--data.batch_size", 101)
    done = run_here(*run, *fragile(most=50), "--data.micro_batch_size", 50, "--trainer.max_steps", 4)
    assert done.code == 0, done.err
    again = ("--trainer.max_steps", 6, "--ckpt_path", "last", "--force", "true")
    stopped, folder = stop_out_of_memory(101, *again)
    assert folder == done.folder
    on = run_process(*run, *TWO, *fragile(most=50), *again, timeout=60)
    assert on.code == 0, on.err
    assert on.folder == done.folder
    assert "resuming after step 4 " in on.out
    assert re.search(r" micro_batch_size  2[45]$", on.out, re.MULTILINE)
    whole = run_here(*run, *fragile(), "--trainer.max_steps", 6, "--name", "whole")
    assert furthest(on, whole) < 1e-10  # see `test_resuming_in_double_precision`
    assert "Traceback" not in stopped.err  # of the process that waits for the other


# Numbers that are not finite


class Points(DataModule):
    """Float64 points; those named are spoilt in training."""

    def __init__(self, spoilt: tuple[int, ...] = (), since_epoch: int = 0, **kwargs: object) -> None:
        super().__init__(**{"batch_size": 10, "seed": 3, **kwargs})  # type: ignore[arg-type]
        self.spoilt, self.since_epoch = torch.tensor(spoilt, dtype=torch.long), since_epoch
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(64, 5, dtype=torch.float64, generator=generator)
        self.y = (self.x @ torch.randn(5, 3, dtype=torch.float64, generator=generator)).argmax(1)

    def load(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x, self.y

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        if training and batch.epoch >= self.since_epoch:
            batch.inputs[torch.isin(batch.index, self.spoilt)] = self.poison
        return batch

    poison = torch.nan


class Wave(torch.autograd.Function):
    """Finite forward; not finite backward where an input is 77."""

    @staticmethod
    def forward(context: object, inputs: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(inputs)  # type: ignore[attr-defined]
        return torch.where(inputs == 77, 0, inputs)

    @staticmethod
    def backward(context: object, *gradients: torch.Tensor) -> torch.Tensor:
        (inputs,) = context.saved_tensors  # type: ignore[attr-defined]
        return torch.where(inputs == 77, torch.inf, gradients[0])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.ones(5)), nn.Linear(5, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        spoilt = (inputs == 77).any(1, keepdim=True)
        hidden = torch.where(spoilt, 77.0, inputs * self.scale)
        return self.last(Wave.apply(torch.where(spoilt, 77 + 0 * inputs * self.scale, hidden)))


class Plain(Task):
    def losses(self, batch: MicroBatch) -> torch.Tensor:
        return F.cross_entropy(self(batch.inputs), batch.targets, reduction="none")


def fit(network: nn.Module, data: DataModule, epochs: int = 3, **settings: object) -> Plain:
    pl.seed_everything(0)
    task = Plain(network, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.05), **settings)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=True, enable_progress_bar=False,
        callbacks=[Last()], default_root_dir=Path.cwd(), precision="64-true",
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    return task


def plain_loop(network: nn.Module, data: Points, epochs: int = 3) -> list[tuple[int, list[int]]]:
    """Train in plain torch, leaving out the steps with a spoilt example; return those."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.05)
    left_out = []
    assert data.plan is not None
    for step in range(epochs * data.plan.steps_per_epoch):
        epoch = step // data.plan.steps_per_epoch
        index = data.order.indices(epoch, *data.plan.bounds(step))
        if torch.isin(index, data.spoilt).any() and epoch >= data.since_epoch:
            left_out.append((step, index.tolist()))
            continue
        optimizer.zero_grad()
        F.cross_entropy(network(data.x[index]), data.y[index]).backward()
        optimizer.step()
    return left_out


def skipped() -> list[tuple[int, list[int]]]:
    with Path("skipped.csv").open() as file:
        return [(int(row[0]), [int(example) for example in row[1:]]) for row in csv.reader(file)]


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 77], ids=["nan", "inf", "gradient only"])
@pytest.mark.slow
def test_a_step_that_is_not_finite_is_left_out(
    poison: float, micro_batch_size: int | None, capsys: pytest.CaptureFixture
) -> None:
    torch.manual_seed(1)
    network = Net().double()
    reference = deepcopy(network)
    data = Points(spoilt=(17, 40), micro_batch_size=micro_batch_size)
    data.poison = poison
    fit(network, data)
    out = capsys.readouterr().out
    left_out = plain_loop(reference, data)
    assert 3 <= len(left_out) <= 6
    assert skipped() == left_out
    lines = [line for line in out.splitlines() if "not finite" in line]
    assert len(lines) == len(left_out)
    for line, (step, examples) in zip(lines, left_out, strict=True):
        some = ", ".join(map(str, examples[:8])) + (", ..." if len(examples) > 8 else "")
        assert line.startswith(f"step {step}: loss or gradient is not finite; skipped; its examples: {some} (all: ")
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_skipped_step_touches_neither_weights_nor_optimizer_nor_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(5, 8, bias=False), GhostBatchNorm(8, 5), Dropout(0.1), nn.Linear(8, 3)).double()
    seen = {}

    def state(task: Task) -> list[torch.Tensor]:
        moments = [value for state in task.trainer.optimizers[0].state.values() for value in state.values()]
        return [tensor.clone() for tensor in (*task.state_dict().values(), *moments)]

    original = Step.run

    def watched(self: Step, task: Task, batch: Batch) -> torch.Tensor:
        before = state(task)
        loss = original(self, task, batch)
        after = state(task)
        seen[batch.step] = len(after) == len(before) and all(map(torch.equal, before, after))
        return loss

    monkeypatch.setattr(Step, "run", watched)
    fit(network, Points(spoilt=(17,)), epochs=2)
    assert len(seen) == 14
    assert [step for step, unchanged in seen.items() if unchanged] == [step for step, _ in skipped()]
    assert len(skipped()) == 2


def test_the_folder_is_made_where_nothing_else_is_kept() -> None:
    task = Plain(Net().double())
    small.fit(task, Points(spoilt=(17,)), max_epochs=1, default_root_dir=Path("not/yet/there"))
    assert len(Path("not/yet/there/skipped.csv").read_text().splitlines()) == 1


def test_looking_can_be_switched_off() -> None:
    network = Net().double()
    fit(network, Points(spoilt=(17,)), epochs=1, max_skipped_steps=0)
    assert not any(parameter.isfinite().all() for parameter in network.parameters())
    assert not Path("skipped.csv").exists()


def test_only_steps_in_a_row_are_counted() -> None:
    fit(Net().double(), Points(spoilt=(17,)), epochs=6, max_skipped_steps=2)
    assert len(skipped()) == 6


@pytest.mark.parametrize("most", [3, 10], ids=["within an epoch", "longer than an epoch"])
@pytest.mark.parametrize("since_epoch", [1, 0], ids=["in the second epoch", "from the start"])
def test_too_many_in_a_row_stop_training(since_epoch: int, most: int) -> None:
    network = Net().double()
    first = deepcopy(network)
    data = Points(spoilt=tuple(range(64)), since_epoch=since_epoch)  # seven steps per epoch
    with pytest.raises(TrainingStopped, match=f"not finite in {most} steps in a row") as stopped:
        fit(network, data, epochs=9, max_skipped_steps=most)
    assert stopped.value.code == 1
    assert "\n" not in str(stopped.value)
    plain_loop(first, data, 9)
    last = Path("checkpoints/last.ckpt")
    if "last.ckpt has the weights from before" in str(stopped.value):
        saved = torch.load(last, weights_only=True)["state_dict"]
        for name, value in first.state_dict().items():
            torch.testing.assert_close(saved[f"network.{name}"], value, rtol=0, atol=1e-12)
    else:
        assert not last.exists()


def test_too_many_in_a_row_end_a_run_with_one_line() -> None:
    spoilt = ("--data", "own_network.Spoilt", "--data.since_epoch", 1, "--data.all_of_them", "true")
    result = run_here(*FIT, *spoilt, "--data.batch_size", 100, "--model.max_skipped_steps", 4)
    assert result.code == 1
    (line,) = errors(result)
    assert line.startswith("error: loss or gradient was not finite in 4 steps in a row, up to step 16: ")
    (folder,) = Path("runs/digits").iterdir()
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 13
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert [row.split(",")[0] for row in (folder / "skipped.csv").read_text().splitlines()] == ["13", "14", "15", "16"]


def test_an_epoch_without_a_finite_step_is_not_an_error() -> None:
    """Seven steps per epoch are fewer than the ten after which training stops."""
    data = Points(spoilt=tuple(range(64)), since_epoch=1)
    fit(Net().double(), data, epochs=2)
    spoilt = ("--data", "own_network.Spoilt", "--data.all_of_them", "true", "--data.batch_size", 200)
    result = run_here(*FIT, *spoilt, "--trainer.max_epochs", 1)
    assert result.code == 0, result.err
    assert "epoch 1  average loss nan" in result.out


@pytest.mark.slow
def test_two_processes_skip_the_same_step() -> None:
    """The spoilt example is in the share of one of them."""
    run = (*FIT, "--data", "own_network.Spoilt", "--data.batch_size", 100)
    two = run_process(*run, *TWO, timeout=60)
    one = run_here(*run, "--name", "one")
    assert two.code == one.code == 0, two.err
    assert furthest(one, two) < 1e-12
    rows = (two.folder / "skipped.csv").read_text()
    assert rows == (one.folder / "skipped.csv").read_text()
    assert len(rows.splitlines()) == 2
    assert all("700" in row.split(",")[1:] for row in rows.splitlines())
    assert two.out.count("loss or gradient is not finite") == 2
    ours, theirs = two.rows("train/loss_epoch"), one.rows("train/loss_epoch")
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-12


class Headed(small.Classify):
    """A part of the network is made by the task, with layers that are exact."""

    def __init__(self, **settings) -> None:
        super().__init__(nn.Sequential(nn.Linear(5, 8), Dropout(0.5)).double(), optimizer=small.adamw, **settings)
        layers = [nn.Linear(8, 8, bias=False), GhostBatchNorm(8, 4), Dropout(0.5), nn.Linear(8, 3)]
        self.head = nn.Sequential(*layers).double()

    def forward(self, inputs):
        return self.head(self.network(inputs))


def test_layers_that_a_task_adds_to_its_network_are_exact() -> None:
    def trained(**sizes: int) -> Task:
        torch.manual_seed(1)
        return small.fit(Headed(), small.Points(**sizes))[0]

    whole, cut = trained(), trained(micro_batch_size=4)
    assert small.furthest(whole, cut) < 1e-12
    norm, layers = whole.head[1], [whole.network[1], whole.head[2]]  # pyright: ignore[reportIndexIssue]
    assert norm.running_mean.abs().min() > 0
    assert [layer.number for layer in layers] == [0, 1]


def test_a_teacher_in_evaluation_mode_keeps_no_examples_together() -> None:
    task = small.Classify(small.network())
    task.teacher = nn.Sequential(GhostBatchNorm(5, 4), GhostBatchNorm(5, 8)).eval()
    assert task._step.unit == 1
    task.teacher.train()
    with pytest.raises(Mistake, match=r"ghost batches of \[4, 8\] examples: write one size"):
        _ = task._step.unit


def test_layers_that_draw_on_the_host_draw_the_same_again_beside_a_gpu(monkeypatch):
    """Such as those of transformers that are left out at random."""
    gpu = torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", (gpu,))

    def draws():
        seed_generator(torch.device("cuda", 0), 5)
        return [torch.rand(3), torch.rand(3, generator=gpu)]

    for first, second in zip(draws(), draws(), strict=True):
        assert torch.equal(first, second)
