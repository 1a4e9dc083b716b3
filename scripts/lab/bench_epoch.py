"""What a whole epoch over 60,000 images costs, with everything that reads, transforms and trains.

28 x 28 bytes (the real digits, scaled up and shifted), the same networks and batch. Alternatives: the loop of a careful
user, whose data is one tensor and whose optimizer is fused; and Lightning as documented: a data set that makes one
example at a time, as torchvision's MNIST with ToTensor and Normalize does, a DataLoader, an optimizer with its
defaults, `self.log`. Ours also with what `speed: auto` chooses, once with the precision left open.

    python scripts/bench_epoch.py
"""

import contextlib
import io
import statistics
import tempfile
import time
from typing import Any

import bench
import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from bench_step import Documented, Made, Memory, adamw, mlp, plain_epoch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from batchwise import host
from batchwise.callbacks.checkpoint import Last
from batchwise.callbacks.epoch_line import EpochLine
from batchwise.choosing import speed
from batchwise.choosing.speed import Stopwatch, Way, candidates, choose
from batchwise.models.convnet import ConvNet
from batchwise.sources.digits import read_digits
from batchwise.tasks.classification import Classification
from batchwise.trainer import Trainer


def images(count: int) -> tuple[Tensor, Tensor]:
    """Return `count` images uint8 [count, 1, 28, 28], digits scaled up three times and shifted, and their classes."""
    small, digits = read_digits()
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(small), (count,), generator=generator)
    large = (small * 15).repeat_interleave(3, 2).repeat_interleave(3, 3)
    canvas = torch.zeros(count, 1, 28, 28, dtype=torch.uint8)
    shifts = torch.randint(5, (count, 2), generator=generator)
    for down in range(5):
        for right in range(5):
            here = (shifts == torch.tensor([down, right])).all(1)
            canvas[here, :, down : down + 24, right : right + 24] = large[chosen[here]]
    return canvas, digits[chosen]


class OneByOne(Dataset):
    """One example at a time, with the operations of torchvision's MNIST, ToTensor and Normalize."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.inputs[i, 0].numpy(), mode="L")
        return normalize(to_tensor(image), (0.13,), (0.31,)), int(self.targets[i])


def to_tensor(image: Image.Image) -> Tensor:
    """Return [1, H, W] from 0 to 1."""
    tensor = torch.from_numpy(np.array(image, np.uint8, copy=True))
    tensor = tensor.view(image.size[1], image.size[0], len(image.getbands()))
    return tensor.permute((2, 0, 1)).contiguous().to(dtype=torch.get_default_dtype()).div(255)


def normalize(tensor: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    """Return (tensor - mean) / deviation."""
    tensor = tensor.clone()
    means = torch.as_tensor(mean, dtype=tensor.dtype, device=tensor.device)
    deviations = torch.as_tensor(deviation, dtype=tensor.dtype, device=tensor.device)
    if (deviations == 0).any():
        raise ValueError("a deviation is zero")
    return tensor.sub_(means.view(-1, 1, 1)).div_(deviations.view(-1, 1, 1))


class Flat(torch.nn.Module):
    """A network that takes images as rows."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map [N, 1, H, W] to [N, classes]."""
        return self.network(images.flatten(1))


class DocumentedEpoch(Documented):
    """The module of Lightning's documentation, with the optimizer's defaults; the data set makes the floats."""

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Return the mean loss and log it."""
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def documented(network: torch.nn.Module, inputs: Tensor, targets: Tensor, batch_size: int) -> float:
    """Return the seconds of one epoch of Lightning."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=CSVLogger(folder),
            enable_model_summary=False,
            default_root_dir=folder,
        )
        loader = DataLoader(OneByOne(inputs, targets), batch_size, shuffle=True)
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.fit(DocumentedEpoch(network), loader)
        return time.perf_counter() - start


def ours(network: torch.nn.Module, inputs: Tensor, targets: Tensor, batch_size: int, way: Way | None = None) -> float:
    """Return the seconds of one epoch of this project, run in some way."""
    way = way or Way(batch_size, threads=torch.get_num_threads())
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=CSVLogger(folder),
            callbacks=[Last(), EpochLine()],
            enable_progress_bar=False,
            log_every_n_steps=50,
            default_root_dir=folder,
            precision=way.precision,  # type: ignore[arg-type]
            channels_last=way.channels_last,
            threads=way.threads,
        )
        data = Memory(inputs, targets, batch_size=batch_size, micro_batch_size=way.size)
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.fit(Classification(network, optimizer=adamw), datamodule=data)
        seconds = time.perf_counter() - start
    host.set_threads(threads)
    return seconds


def chosen(make: Made, inputs: Tensor, targets: Tensor, batch_size: int, settings: dict[str, Any], rounds: int) -> Way:
    """Return what `speed: auto` chooses."""
    data, task = Memory(inputs, targets, batch_size=batch_size), Classification(make(), optimizer=adamw)
    tried = candidates(task, data, settings, torch.device("cpu"), 1)
    size = max((size for size in tried["size"] if size <= 256), default=batch_size)
    start = Way(size, threads=torch.get_num_threads())
    watch = Stopwatch(task, data, batch_size, torch.device("cpu"), max(1, rounds))
    way, lines = choose(watch, start, tried, examples=len(inputs))
    print("\n".join(lines))
    return way


def main() -> None:
    """Measure and report."""
    given = bench.arguments(__doc__)
    speed._TURN = min(speed._TURN, given.scale)  # a tiny form need not measure well
    inputs, targets = images(int(60_000 * given.scale))
    figures = {}
    for title, make, batch_size, share in (
        ("MLP 784-256-10, batch 64", lambda: Flat(mlp()), 64, 1.0),
        ("MLP 784-256-10, batch 512", lambda: Flat(mlp()), 512, 1.0),
        ("ConvNet, batch 256", ConvNet, 256, 0.1),
    ):
        count, batch_size = int(len(inputs) * share), max(16, int(batch_size * min(1.0, 10 * given.scale)))
        x, y = inputs[:count], targets[:count]
        exact = chosen(make, x, y, batch_size, {"precision": "32-true"}, given.pairs)
        fast = chosen(make, x, y, batch_size, {}, given.pairs)
        alternatives = {
            "plain PyTorch loop, data in one tensor": lambda: plain_epoch(make(), x, y, batch_size),  # noqa: B023
            "ours": lambda: ours(make(), x, y, batch_size),  # noqa: B023
            "ours, speed: auto in float32": lambda: ours(make(), x, y, batch_size, exact),  # noqa: B023
            "ours, speed: auto": lambda: ours(make(), x, y, batch_size, fast),  # noqa: B023
            "Lightning as documented": lambda: documented(make(), x, y, batch_size),  # noqa: B023
        }
        measured = bench.interleave(alternatives, given.pairs)
        title = f"one epoch of {count:,} images, {title}"
        figures[title] = bench.report(title, "seconds", measured, "plain PyTorch loop, data in one tensor")
        for name in ("ours", "ours, speed: auto in float32", "ours, speed: auto"):
            ratios = zip(measured["Lightning as documented"], measured[name], strict=True)
            print(
                f"  {name}: {statistics.median(a / b for a, b in ratios):.1f} times as fast as Lightning as documented"
            )
    bench.save(given.json, figures)


if __name__ == "__main__":
    main()
