"""Layers and draws that are keyed by example give the same on the device as on the CPU."""

from dataclasses import replace
from typing import Any

import parts
import pytest
import small
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchwise import MicroBatch
from batchwise.batching.order import Shuffled
from batchwise.data.augment import Affine, Augmentation, ColourJitter, CutOut, Flip, ShiftCrop, augment
from batchwise.data.mixing import CutMix, MixUp
from batchwise.models import dropout, place

pytestmark = pytest.mark.gpu


@pytest.fixture
def in_double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_of_keyed_dropout(p: float, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "current", place.Place(key=123456789012345, first=7, size=1000))
    ours = dropout.mask(torch.ones(1000, 33, device=device), p, 2)
    theirs = dropout.mask(torch.ones(1000, 33), p, 2)
    assert ours.device.type == device.type
    assert abs((theirs == 0).double().mean() - p) < 0.01
    assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("key", [0, 987654321])
def test_draws_of_a_batch(key: int, device: torch.device, in_double: None) -> None:
    host = MicroBatch(torch.zeros(50, 2), None, torch.arange(100, 150), position=30, key=key)
    moved = host.to(device)
    for name, shape in (("a", ()), ("b", (3, 4))):
        assert moved.rand(name, *shape).device.type == device.type
        assert torch.equal(moved.rand(name, *shape).cpu(), host.rand(name, *shape))
        assert (moved.randn(name, *shape).cpu() - host.randn(name, *shape)).abs().max() < 1e-12
    assert host.randn("b", 3, 4).std() > 0.5


AUGMENTATIONS: dict[str, Augmentation] = {
    "flip": Flip(),
    "flip in turn": Flip(alternate=True),
    "shift": ShiftCrop(2),
    "cut out": CutOut(4),
    "colour": ColourJitter(0.4, 0.4, 0.4),
    "affine": Affine(20, 10, (0.8, 1.2), 0.1),
    "mix up": MixUp(3),
    "cut mix": CutMix(3),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations(name: str, device: torch.device) -> None:
    images = torch.rand(20, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(20) % 3
    step = AUGMENTATIONS[name]
    host = MicroBatch(images, targets, torch.arange(40, 60), position=10, epoch=2, key=5)
    moved = replace(host.to(device))
    theirs, ours = (augment(one, [step], step.after_transform, 3, Shuffled()) for one in (host, moved))
    assert (theirs.inputs - images).abs().max() > 0.01
    assert ours.inputs.device.type == device.type
    assert (ours.inputs.cpu() - theirs.inputs).abs().max() < 1e-12
    assert (ours.targets.cpu() - theirs.targets).abs().max() < 1e-12


def test_augmentations_of_bytes(device: torch.device) -> None:
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    host = MicroBatch(images, None, torch.arange(20), key=5)
    theirs, ours = (augment(one, [Flip(), ShiftCrop(2)], False, 3, Shuffled()) for one in (host, host.to(device)))
    assert not torch.equal(theirs.inputs, images)
    assert torch.equal(ours.inputs.cpu(), theirs.inputs)


class Noisy(small.Classify):
    """Trains on noise of its own, and on a random part of the inputs."""

    def losses(self, batch: MicroBatch) -> Tensor:
        noise, kept = batch.randn("noise", 5), batch.rand("kept", 5) < 0.8
        return F.cross_entropy(self((batch.inputs + 0.3 * noise) * kept), batch.targets, reduction="none")


def ghosts() -> small.Task:
    net = parts.mlp(nn.BatchNorm1d(8))
    return small.Classify(net, optimizer=small.adamw, ghost_batch_size=5)


def dropped() -> small.Task:
    net = parts.mlp(nn.Dropout(0.3))
    return small.Classify(net, optimizer=small.adamw, exact_dropout=True)


def noisy() -> small.Task:
    return Noisy(parts.mlp(), optimizer=small.adamw)


@pytest.mark.parametrize("make", [ghosts, dropped, noisy])
def test_training_in_micro_batches_is_that_of_the_cpu(make: Any, on: dict[str, Any], in_double: None) -> None:
    """Running statistics are compared too."""
    start = make()
    expected, _ = small.fit(make(), small.Points(batch_size=20))
    cut, _ = small.fit(make(), small.Points(batch_size=20, micro_batch_size=5), **on)
    whole, _ = small.fit(make(), small.Points(batch_size=20), **on)
    assert small.furthest(expected, start) > 0.1
    assert small.furthest(whole, expected) < 1e-10
    assert small.furthest(cut, whole) < 1e-11


class LeftOut(nn.Linear):
    """Is left out in half of the passes, by a number that the host draws."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs if torch.rand(()) < 0.5 else super().forward(inputs)


def left_out() -> small.Task:
    torch.manual_seed(1)
    return small.Classify(nn.Sequential(LeftOut(5, 5), nn.Linear(5, 3)).double(), optimizer=small.adamw)


def test_a_layer_that_draws_on_the_host_draws_what_it_draws_on_a_cpu(on: dict[str, Any], in_double: None) -> None:
    start = left_out()
    here, _ = small.fit(left_out(), small.Points(micro_batch_size=4))
    there, _ = small.fit(left_out(), small.Points(micro_batch_size=4), **on)
    assert small.furthest(here, start) > 0.1
    assert small.furthest(there, here) < 1e-10
