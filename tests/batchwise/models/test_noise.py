"""Noise in a network: the same in any micro-batches, also in evaluation, and plain outside a task."""

from typing import Any

import pytest
import torch
from small import Classify, Points, adamw, fit, furthest, network
from torch import Tensor, nn

from batchwise import MicroBatch
from batchwise.models import noise, place


class Noisy(nn.Module):
    """Noise before and after the network of `small`: some drawn by key, or all by the global generator."""

    def __init__(self, keyed: bool = True) -> None:
        super().__init__()
        self.layers, self.keyed = network(), keyed

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.layers(x)
        if not self.keyed:
            return self.layers(x + torch.randn_like(x))
        logits = self.layers(x + noise.randn_like(x, "inputs"))
        return logits * noise.rand_like(logits, "outputs")


def trained(keyed: bool = True, **sizes: int) -> nn.Module:
    return fit(Classify(Noisy(keyed), optimizer=adamw), Points(**sizes))[0]


@pytest.mark.slow
def test_noise_does_not_depend_on_micro_batches():
    whole = trained()
    assert furthest(whole, trained(micro_batch_size=3)) < 1e-12
    assert furthest(whole, trained(micro_batch_size=1)) < 1e-12
    assert furthest(trained(False), trained(False, micro_batch_size=3)) > 1e-3  # which is why it is keyed


class Sampler(Noisy):
    """Draws in evaluation as in training, as an autoencoder may."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x + noise.randn_like(x, "inputs"))


def test_noise_in_evaluation_is_that_of_the_example():
    def measured(eval_batch_size: int, seed: int) -> tuple[float, Tensor]:
        data = Points(eval_batch_size=eval_batch_size)
        task, trainer = fit(Classify(Sampler(), optimizer=adamw), data, max_steps=2)
        torch.manual_seed(seed)
        loss = trainer.validate(task, datamodule=data, verbose=False)[0]["val/loss"]
        pages: Any = trainer.predict(task, datamodule=data)
        return loss, torch.cat([page["predictions"]["output"] for page in pages])

    (loss, output), (other_loss, other_output) = measured(5, 0), measured(3, 1)
    assert loss == pytest.approx(other_loss, abs=1e-12)
    assert (output - other_output).abs().max() < 1e-12
    x = torch.zeros(5, 4)
    assert (noise.randn_like(x, "inputs") != noise.randn_like(x, "inputs")).all()  # outside it is plain


@pytest.fixture
def at(monkeypatch):
    return lambda key, first: monkeypatch.setattr(place, "current", key and place.Place(key, first))


def test_what_noise_depends_on(at):
    values = torch.zeros(6, 4, 3)
    at(7, 10)
    drawn = noise.randn_like(values, "z")
    assert torch.equal(drawn, noise.randn_like(values, "z"))
    at(7, 12)
    assert torch.equal(drawn[2:], noise.randn_like(values[2:], "z"))
    assert len(torch.cat([drawn, noise.randn_like(values, "other")]).unique()) == 2 * drawn.numel()
    at(8, 10)
    assert (noise.randn_like(values, "z") != drawn).all()
    assert noise.randn_like(values[:0], "z").shape == (0, 4, 3)
    assert noise.randn_like(values.bfloat16(), "z").dtype == torch.bfloat16


def test_the_distributions(at):
    at(1, 0)
    values = torch.zeros(400, 500, dtype=torch.float64)
    normal, uniform = noise.randn_like(values, "z"), noise.rand_like(values, "z")
    for drawn, cdf in ((normal, lambda x: torch.special.ndtr(x)), (uniform, lambda x: x)):
        ranks = cdf(drawn.flatten()).sort().values  # Kolmogorov and Smirnov
        furthest = (ranks - torch.linspace(0, 1, len(ranks), dtype=torch.float64)).abs().max()
        assert furthest < 1.95 / len(ranks) ** 0.5  # p = 0.001
    half = noise.rand_like(values.bfloat16(), "z")
    assert (half >= 0).all()
    assert (half < 1).all()
    for drawn in (normal - normal.mean(), uniform - 0.5):
        for one, other in (
            (drawn[1:], drawn[:-1]),
            (drawn[:, 1:], drawn[:, :-1]),
        ):  # neighbours know nothing of another
            correlation = (one * other).mean() / drawn.var()
            assert abs(correlation) < 4 / one.numel() ** 0.5


def test_a_network_draws_as_the_micro_batch_does(at):
    """From one source; so in two places they need two names."""
    batch = MicroBatch(torch.zeros(6, 4), None, torch.arange(6), position=10, key=7)
    at(7, 10)
    assert torch.equal(batch.randn("z", 4), noise.randn_like(batch.inputs, "z"))
    assert torch.equal(batch.rand("z", 4), noise.rand_like(batch.inputs, "z"))


def test_outside_training_it_is_plain():
    values = torch.zeros(3, 2)
    for ours, theirs in ((noise.randn_like, torch.randn_like), (noise.rand_like, torch.rand_like)):
        torch.manual_seed(2)
        drawn = ours(values, "z")
        torch.manual_seed(2)
        assert torch.equal(drawn, theirs(values))


@pytest.mark.slow
def test_a_compiler_does_not_freeze_it(at):
    compiled = torch.compile(lambda x: x + noise.randn_like(x, "z"), backend="aot_eager", fullgraph=True)
    values = torch.zeros(4, 2, requires_grad=True)
    for key in (3, 4):
        at(key, 0)
        drawn = compiled(values)
        assert torch.equal(drawn, noise.randn_like(values, "z"))
        drawn.sum().backward()
    assert values.grad is not None
