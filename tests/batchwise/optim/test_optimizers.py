"""Optimizers of a kept library: LARS, LAMB, Muon."""

import pytest
from helpers import CSV, DIGITS, furthest, run_here
from torch import nn

from batchwise.models.mlp import MLP
from batchwise.optim.muon import Muon
from batchwise.optim.scaling import Scaling, default_rule

OPTIMIZERS = {
    "lars": "{class_path: pytorch_optimizer.LARS, init_args: {lr: 0.5, trust_coefficient: 0.02, weight_decay: 0.0001}}",
    "lamb": "{class_path: pytorch_optimizer.Lamb, init_args: {lr: 0.02, weight_decay: 0.05}}",
    "muon": "{class_path: batchwise.optim.muon.Muon, init_args: {lr: 0.02, adamw_lr: 0.003, weight_decay: 0.05}}",
}


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(made, id=name, marks=[pytest.mark.weekly] * (name != "lars")) for name, made in OPTIMIZERS.items()],
)
@pytest.mark.slow
def test_digits_are_learned_at_a_large_batch_and_a_resume_is_exact(optimizer: str) -> None:
    common = ("fit", *DIGITS, *CSV, "--model.optimizer", optimizer, "--data.batch_size", 256)
    common = (*common, "--model.schedule", "{shape: constant, warmup_examples: 2000}")
    whole = run_here(*common, "--name", "whole", "--trainer.max_epochs", 10)
    assert whole.code == 0, whole.err
    assert whole.rows("val/accuracy")[50] > 0.96
    stopped = run_here(*common, "--trainer.max_steps", 42)
    assert stopped.code == 0, stopped.err
    on = run_here(*common, "--trainer.max_epochs", 10, "--ckpt_path", "last")
    assert on.code == 0, on.err
    assert furthest(whole, on) == 0


def test_muon_takes_the_hidden_matrices_alone() -> None:
    network = MLP(64, 10, [32, 16], norm="layer")
    optimizer = Muon(network.parameters(), weight_decay=0.1)
    taken = {tuple(weight.shape) for group in optimizer.param_groups if group["use_muon"] for weight in group["params"]}
    assert taken == {(32, 64), (16, 32)}
    decays = {weight.ndim: group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert decays == {2: 0.1, 1: 0.0}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(network.parameters()))
    assert {group["lr"] for group in optimizer.param_groups} == {0.02, 0.003}


def test_rules() -> None:
    from pytorch_optimizer import LARS, Lamb

    weights = list(nn.Linear(3, 2).parameters())
    assert default_rule(LARS(weights)) == "linear"
    assert default_rule(Lamb(weights)) == "sqrt"
    optimizer = Muon(weights, weight_decay=0.1, last=0)
    Scaling(64).apply(optimizer, 256)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.04)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.2)
