"""The cost of a step of cifar10.yaml: ours, and a plain loop in the style of the CIFAR-10 speed records.

Both have the same ResNet, batch, loss, optimizer (fused SGD) and augmentation (alternating flip, shift-crop), on random
images. The plain loop (after Jordan 2024, arXiv 2404.00498) keeps normalised images on the device, augments all of them
at the start of an epoch, and only trains. On a GPU both compile the network and take bfloat16 and channels_last. On a
CPU neither does, and the ratio says little.

    python scripts/lab/bench_cifar.py
"""

import tempfile
import time
from functools import partial
from typing import Any

import bench
import torch
import torch.nn.functional as F
from bench_step import Made, quiet, warm_up
from cifar10 import CIFAR10, MEAN, STD
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from batchwise.batching.loader import MicroBatch
from batchwise.data import pixels as change
from batchwise.data.augment import Flip, ShiftCrop
from batchwise.host import wait_for
from batchwise.models.resnet import ResNet
from batchwise.tasks.classification import Classification
from batchwise.trainer import Trainer

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SMOOTHING, SHIFT = 0.2, 4
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)


def plain(make: Made, pixels: Tensor, targets: Tensor, batch_size: int, steps: int) -> float:
    """Return microseconds per step of the plain loop."""
    network: Any = make()
    network.to(DEVICE, memory_format=torch.channels_last if CUDA else torch.contiguous_format)
    network = torch.compile(network) if CUDA else network
    optimizer, not_timed, done, epoch = sgd(network.parameters()), warm_up(steps), 0, 0
    mean, std = (torch.tensor(numbers, device=DEVICE).view(3, 1, 1) for numbers in (MEAN, STD))
    stored, targets = (pixels.to(DEVICE).float() - mean) / std, targets.to(DEVICE)
    first = torch.rand(len(stored), device=DEVICE) < 0.5
    while done < not_timed + steps:
        shifts = torch.randint(-SHIFT, SHIFT + 1, (2, len(stored)), device=DEVICE)
        inputs = change.shift(change.flip(stored, first ^ (epoch % 2 == 1)), *shifts)
        inputs = inputs.contiguous(memory_format=torch.channels_last) if CUDA else inputs
        for index in torch.randperm(len(inputs), device=DEVICE).split(batch_size)[: not_timed + steps - done]:
            if done == not_timed:
                wait_for(DEVICE)
                start = time.perf_counter()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
                loss = F.cross_entropy(network(inputs[index]), targets[index], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
        epoch += 1
    wait_for(DEVICE)
    return (time.perf_counter() - start) / steps * 1e6


class Clock:
    """Times the steps after the warm-up. It waits for the device before the first and after the last of them."""

    def __init__(self, not_timed: int, steps: int) -> None:
        self.ends, self.step, self.times = (not_timed, not_timed + steps), -1, []

    def begin(self) -> None:
        """Count a step that begins."""
        self.step += 1
        if self.step in self.ends:
            wait_for(DEVICE)
            self.times.append(time.perf_counter())


class Random(CIFAR10):
    """Random images in place of those of the archive."""

    def __init__(self, pixels: Tensor, targets: Tensor, clock: Clock, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tensors, self.clock = (pixels, targets), clock

    def load(self, split: str) -> Any:
        """Return the training split alone."""
        return self.tensors if split == "train" else None

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        """Normalise, and tell the clock."""
        if batch.position == 0:
            self.clock.begin()
        return super().transform(batch, training)


def ours(make: Made, pixels: Tensor, targets: Tensor, batch_size: int, steps: int) -> float:
    """Return microseconds per step of ours."""
    not_timed, network = warm_up(steps), make()
    clock, augment = Clock(not_timed, steps), [Flip(alternate=True), ShiftCrop(SHIFT)]
    data = Random(pixels, targets, clock, batch_size=batch_size, augment=augment)
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = Trainer(
            max_steps=steps + not_timed + 1,
            accelerator=DEVICE.type,
            devices=1,
            precision="bf16-mixed" if CUDA else "32-true",
            channels_last=CUDA,
            compile=CUDA,
            logger=CSVLogger(folder),
            log_every_n_steps=50,
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        trainer.fit(Classification(network, optimizer=sgd, label_smoothing=SMOOTHING), datamodule=data)
    return (clock.times[1] - clock.times[0]) / steps * 1e6


def main() -> None:
    """Measure and report."""
    given = bench.arguments(__doc__)
    batch_size, steps = max(4, int(512 * min(1.0, given.scale))), max(2, int(200 * given.scale))
    pixels = torch.randint(0, 256, (20 * batch_size, 3, 32, 32), dtype=torch.uint8)
    widths = [max(4, int(width * min(1.0, given.scale))) for width in (64, 128, 256, 256)]
    work = partial(ResNet, channels=widths), pixels, torch.randint(0, 10, (len(pixels),)), batch_size, steps
    alternatives = {"plain loop, in the style of airbench": plain, "ours": ours}
    measured = bench.interleave({name: partial(run, *work) for name, run in alternatives.items()}, given.pairs)
    title = f"ResNet, 32 x 32 images, batch {batch_size}"
    figures = bench.report(title, "microseconds per step", measured, "plain loop, in the style of airbench")
    bench.save(given.json, {title: figures})


if __name__ == "__main__":
    main()
