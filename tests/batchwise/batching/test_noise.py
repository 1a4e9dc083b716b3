"""The gradient noise scale: its estimator against known truths, and its callback in real runs."""

import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import small
import torch
from helpers import BF16, CSV, DIGITS, TWO, Result, furthest, run_here, run_process
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from torch import Tensor

from batchwise.batching.noise import FEWEST, Sample, noise_scale, sample
from batchwise.callbacks.noise_scale import NoiseScale
from batchwise.errors import TrainingStopped

# A loss that is linear in the weights has the same gradients whatever the weights are: those of the examples are the
# examples, so that the truth is known throughout training.
LINEAR = """
from dataclasses import replace
import torch
from torch import nn
from batchwise.data.module import DataModule
from batchwise.tasks.task import Task

class Cloud(DataModule):
    def __init__(self, scale: float = 50.0, examples: int = 12800, poison: int = -1, **kwargs):
        super().__init__(**kwargs)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(examples, 50, dtype=torch.float64, generator=generator) * torch.linspace(0.5, 1.5, 50)
        x = x - x.mean(0)
        noise = x.square().sum() / (examples - 1)
        self.x = (x + (noise / scale / 50).sqrt()).float()
        if poison >= 0:
            self.x[poison] = torch.nan

    def load(self, split):
        return (self.x,) if split == "train" else None

    def transform(self, batch, training):
        return replace(batch, inputs=batch.inputs.to(torch.get_default_dtype()))

class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.unused = nn.Parameter(torch.zeros(20)), nn.Parameter(torch.zeros(30))
        self.fixed = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x):
        return x[:, :20] @ self.weight + x[:, 20:] @ self.unused

class Slope(Task):
    def __init__(self, weight: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.weight = weight

    def losses(self, batch):
        losses = self(batch.inputs)
        return losses, torch.full_like(losses, self.weight)
"""
NAMES = ("noise_scale", "noise_scale_low", "noise_scale_high")


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_linear.py").write_text(LINEAR)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_linear", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def callback(**settings: object) -> tuple[str, str]:
    arguments = ", ".join(f"{name}: {value}" for name, value in settings.items())
    return (
        "--trainer.callbacks",
        f"[{{class_path: batchwise.callbacks.noise_scale.NoiseScale, init_args: {{{arguments}}}}}]",
    )


def linear(*arguments: object, window: int = 100, every: int = 1, **data: object) -> tuple[object, ...]:
    """100 batches of 128 examples, whose noise scale is 50."""
    settings = "".join(f", {name}: {value}" for name, value in data.items())
    Path("linear.yaml").write_text(
        f"name: linear\nseed_everything: 0\n"
        f"trainer: {{max_epochs: 1, accelerator: cpu, precision: 64-true}}\n"
        f"data: {{class_path: own_linear.Cloud, init_args: {{batch_size: 128{settings}}}}}\n"
        f"model: {{class_path: own_linear.Slope, init_args: {{network: {{class_path: own_linear.Linear}},"
        f" optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.1}}}}}}}}\n"
    )
    return "fit", "--config", "linear.yaml", *CSV, *callback(every_n_steps=every, window=window), *arguments


def samples(result: Result) -> list[list[float]]:
    return result.checkpoint()["callbacks"]["NoiseScale"]["samples"]


# The estimator


def batches(sizes: list[list[int]], scale: float, repeats: int, dimensions: int, heavy: bool = False) -> list[Sample]:
    """Simulate a batch of each list of sizes; fields are [repeats]. S is `dimensions`, |G|^2 is S / scale."""
    found = []
    for parts in sizes:
        x = torch.randn(repeats, sum(parts), dimensions, dtype=torch.float64)
        if heavy:  # a skewed distribution of mean 0 and variance 1
            x = x.abs().log().neg().exp().clamp(max=8)
            x = (x - x.mean()) / x.std()
        x += scale**-0.5
        means = [part.mean(1) for part in x.split(parts, dim=1)]
        small = sum(size * mean.square().sum(1) for size, mean in zip(parts, means, strict=True))
        found.append(sample(small, x.mean(1).square().sum(1), len(parts), sum(parts)))  # type: ignore[arg-type]
    return found


def test_equal_parts_give_the_formulas_of_the_paper() -> None:
    b, k, mean_small, whole = 8, 4, 3.0, 1.5
    found = sample(k * b * mean_small, whole, k, k * b)
    assert found.noise == pytest.approx((mean_small - whole) / (1 / b - 1 / (k * b)))
    assert found.signal == pytest.approx((k * b * whole - b * mean_small) / (k * b - b))


@pytest.mark.parametrize("parts", [[1, 1], [4, 4, 4, 4], [2, 3, 3], [1, 9], [7, 2, 1, 5, 1]])
def test_no_bias_with_unequal_parts(parts: list[int]) -> None:
    torch.manual_seed(0)
    (found,) = batches([parts], scale=4.0, repeats=40_000, dimensions=6)
    for values, truth in ((found.noise, 6.0), (found.signal, 1.5)):
        assert isinstance(values, Tensor)
        error = values.std() / math.sqrt(len(values))
        assert error < 0.03 * truth
        assert abs(values.mean() - truth) < 4 * error


@pytest.mark.parametrize(
    ("sizes", "scale", "dimensions", "heavy"),
    [
        ([[16] * 4], 64, 5, False),
        ([[16] * 4], 640, 50, False),  # the signal is barely there
        ([[8, 8]], 5000, 20, False),  # it is lost
        ([[5, 6]] * 9 + [[1, 1]], 30, 20, False),  # short last batches
        ([[4] * 4], 16, 5, True),
        ([[16] * 4], 2, 3, False),
    ],
)
@pytest.mark.weekly
def test_the_interval_covers_the_truth_as_often_as_it_says(
    sizes: list[list[int]], scale: float, dimensions: int, heavy: bool
) -> None:
    torch.manual_seed(0)
    repeats = 1000
    found = batches(list(itertools.islice(itertools.cycle(sizes), FEWEST)), scale, repeats, dimensions, heavy)
    noises, signals = (torch.stack([getattr(s, name) for s in found]).T.tolist() for name in ("noise", "signal"))
    examples = [s.examples for s in found]
    covered = 0
    for noise, signal in zip(noises, signals, strict=True):
        estimate = noise_scale(map(Sample, examples, noise, signal))
        assert 0 < estimate.low <= estimate.scale <= estimate.high
        assert estimate.lost == (estimate.high == math.inf)
        covered += estimate.low <= scale <= estimate.high
    assert 0.92 <= covered / repeats <= 0.98


def test_sums_are_divided_and_not_quotients_averaged() -> None:
    found = noise_scale([Sample(10, 6.0, 1.0), Sample(10, 2.0, 3.0), Sample(20, 4.0, 2.0)] * 20)
    assert found.scale == pytest.approx((10 * 6 + 10 * 2 + 20 * 4) / (10 * 1 + 10 * 3 + 20 * 2))
    assert str(found).startswith("2 examples (95%: 1.")


@pytest.mark.parametrize("offset", [0.0, -0.01])
def test_a_lost_signal_gives_a_lower_bound(offset: float) -> None:
    found = noise_scale([Sample(64, 10.0, offset + 0.5 * (-1) ** i) for i in range(40)])
    assert found.lost
    assert (found.scale, found.high) == (math.inf, math.inf)
    assert found.low == pytest.approx(10 / (2.0227 * 0.5 / math.sqrt(39)), rel=2e-3)
    assert str(found) == "more than 61.8 examples"


def test_without_noise_the_scale_is_zero() -> None:
    assert noise_scale([Sample(64, 0.0, 2.0)] * 40) == (0, 0, 0, False)
    assert noise_scale([Sample(64, 0.0, 0.0)] * 40) == (math.inf, 0, math.inf, True)
    with pytest.raises(ValueError, match="of 1 batch"):
        noise_scale([Sample(64, 1.0, 1.0)])


# The callback


@pytest.mark.parametrize("micro_batch_size", [8, 32, 50, 64])
@pytest.mark.weekly
def test_the_truth_is_found(micro_batch_size: int) -> None:
    result = run_here(*linear(micro_batch_size=micro_batch_size))
    assert result.code == 0, result.err
    scale, low, high = (result.rows(name) for name in NAMES)
    assert list(scale) == list(low) == list(high) == list(range(40, 101))  # none before there are 40 samples
    assert low[100] < 50 < high[100]
    assert abs(scale[100] - 50) < 5
    assert high[100] - low[100] < 15
    x = torch.stack([torch.tensor(values) for values in samples(result)]).mean(0)
    parts = math.ceil(128 / micro_batch_size)
    deviation = math.sqrt(2 / (50 * (parts - 1) * 100))  # of the mean of 100 estimates, relative, in 50 dimensions
    assert x[1].item() == pytest.approx(50 * 13 / 12, rel=4 * deviation)  # the variances' mean is 13 / 12


@pytest.mark.weekly
def test_two_processes_find_what_one_finds() -> None:
    """With the same parts; also with a single micro-batch on each, and where one of them has nothing to do."""
    run = linear(examples=12801)  # the last batch is of one example
    two = run_process(*run, *TWO, timeout=60)
    one = run_here(*run, "--data.micro_batch_size", 64, "--name", "one")
    assert two.code == one.code == 0, two.err
    ours, theirs = (torch.tensor(samples(result), dtype=torch.float64) for result in (two, one))
    assert ours.shape == (100, 3)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    for name in NAMES:
        assert two.rows(name) == pytest.approx(one.rows(name), rel=1e-9)
        assert len(two.rows(name)) == 62
    assert two.rows("noise_scale_low")[100] < 50 < two.rows("noise_scale_high")[100]


@pytest.mark.weekly
def test_two_processes_with_several_micro_batches() -> None:
    run = (*linear(micro_batch_size=16), "--trainer.max_steps", 5)
    two, one = run_process(*run, *TWO, timeout=60), run_here(*run, "--name", "one")
    ours, theirs = (torch.tensor(samples(result), dtype=torch.float64) for result in (two, one))
    assert len(ours) == 5
    assert furthest(one, two) < 1e-12
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


FIT = ("fit", *DIGITS, *CSV, "--trainer.max_epochs", 3, "--data.batch_size", 60, "--data.micro_batch_size", 16)


@pytest.mark.parametrize("more", [(), BF16, ("--trainer.gradient_clip_val", 0.1)])
@pytest.mark.weekly
def test_training_is_the_same_to_the_bit(more: tuple[object, ...]) -> None:
    seen = run_here(*FIT, *more, *callback(every_n_steps=1))
    plain = run_here(*FIT, *more, "--name", "plain")
    assert seen.code == plain.code == 0, seen.err
    assert len(samples(seen)) == 40
    assert furthest(seen, plain) == 0
    for column in ("train/loss", "gradient_norm", "val/loss"):
        assert seen.rows(column) == plain.rows(column)
    scale, low, high = (seen.rows(name)[63] for name in NAMES)
    assert 1 < low < scale < high < 10_000


@pytest.mark.slow
def test_clipping_and_precision_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first sample is taken at the same weights; half precision rounds."""
    run = (*FIT, *callback(every_n_steps=1), "--trainer.max_steps", 1, "--name")
    (plain,) = samples(run_here(*run, "plain"))
    (clipped,) = samples(run_here(*run, "clipped", "--trainer.gradient_clip_val", 0.1))
    (double,) = samples(run_here(*run, "double", "--trainer.precision", "64-true"))
    # Lightning makes no fp16 on a CPU.
    scaler, original = torch.amp.GradScaler("cpu"), MixedPrecision.__init__

    def half(self: MixedPrecision, precision: str, device: str) -> None:
        original(self, "16-mixed", device, scaler)

    monkeypatch.setattr(MixedPrecision, "__init__", half)
    (scaled,) = samples(run_here(*run, "scaled", *BF16))
    assert scaler.get_scale() == 2**16
    assert clipped == plain
    assert plain == pytest.approx(double, rel=1e-5)
    assert scaled == pytest.approx(double, rel=0.02)


@pytest.mark.parametrize("stop", [27, 41, 50])
@pytest.mark.slow
def test_a_resumed_run_goes_on_exactly(stop: int) -> None:
    run = linear(micro_batch_size=64, every=2)
    whole = run_here(*run, "--trainer.max_epochs", 2, "--name", "whole")
    run_here(*run, "--trainer.max_steps", stop)
    on = run_here(*run, "--trainer.max_epochs", 2, "--ckpt_path", "last", "--force", "true")
    assert on.code == whole.code == 0, on.err
    assert samples(on) == samples(whole)
    for name in NAMES:
        assert len(whole.rows(name)) == 61
        assert on.rows(name) == whole.rows(name)


@pytest.mark.parametrize("most", [10, 0])
@pytest.mark.slow
def test_a_step_that_is_not_finite_is_no_sample(most: int) -> None:
    result = run_here(*linear(micro_batch_size=64, poison=700), "--model.max_skipped_steps", most)
    assert result.code == 0, result.err
    assert ("not finite; skipped" in result.out) == (most > 0)
    found = samples(result)
    assert len(found) == 99
    assert all(map(math.isfinite, itertools.chain(*found)))


@pytest.mark.slow
def test_a_pass_that_ran_out_of_memory_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    import own_linear

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(context: object, weight: Tensor) -> Tensor:
            return weight.clone()

        @staticmethod
        def backward(context: object, *gradients: Tensor) -> Tensor:
            if sizes[-2:] == [64, 64]:  # in the second micro-batch
                raise torch.OutOfMemoryError("out of memory")
            return gradients[0]

    sizes = []
    original = own_linear.Linear.forward

    def forward(self: torch.nn.Module, x: Tensor) -> Tensor:
        if self.training:
            sizes.append(len(x))
            x = x + 0 * Full.apply(self.weight).sum()
        return original(self, x)

    expected = samples(run_here(*linear(micro_batch_size=32), "--trainer.max_steps", 3))
    monkeypatch.setattr(own_linear.Linear, "forward", forward)
    result = run_here(*linear(micro_batch_size=64), "--trainer.max_steps", 3, "--name", "full")
    assert result.out.count("out of memory") == 1
    assert samples(result) == [pytest.approx(values) for values in expected]


def test_weights_do_not_change_the_scale() -> None:
    run = (*linear(micro_batch_size=32), "--trainer.max_steps", 3, "--name")
    plain, weighted = (samples(run_here(*run, f"run{weight}", "--model.weight", weight)) for weight in (1, 0.25))
    assert weighted == [pytest.approx([size, noise / 16, signal / 16]) for size, noise, signal in plain]


def test_another_fit_begins_anew() -> None:
    seen, trainer, task = (
        NoiseScale(),
        SimpleNamespace(strategy=SingleDeviceStrategy()),
        small.Classify(small.network()),
    )
    seen.load_state_dict({"samples": [[64, 1.0, 1.0]]})
    seen.setup(trainer, task, "fit")  # type: ignore[arg-type]
    assert not seen.samples
    trainer.strategy = FSDPStrategy()
    with pytest.raises(TrainingStopped, match="under FSDPStrategy: write"):
        seen.setup(trainer, task, "fit")  # type: ignore[arg-type]


def test_a_lost_signal_is_said_once() -> None:
    result = run_here(*linear(micro_batch_size=64, scale=1e7))
    assert result.out.count("the gradient noise scale is more than") == 1
    assert not result.rows("noise_scale")
    assert not result.rows("noise_scale_high")
    assert min(result.rows("noise_scale_low").values()) > 200


def test_one_part_cannot_be_compared() -> None:
    message = (
        "the gradient noise scale compares parts of a batch, but each batch is run in one: "
        "write data.micro_batch_size, such as 32"
    )
    with pytest.warns(match=message):
        result = run_here(*linear())
    assert result.code == 0
    assert not result.rows("noise_scale_low")


def test_a_window_that_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="window is 39"):
        NoiseScale(window=39)
