"""The learning rate follows the batch size. It is quoted at one batch size and used at another."""

from math import sqrt
from typing import Any

from torch.optim import Optimizer

RULES = ("linear", "sqrt", "none")


def default_rule(optimizer: Optimizer) -> str:
    """Return "sqrt" for adaptive optimizers and Muon, whose step size does not depend on the gradient's scale.

    For all others, such as SGD, return "linear" (Goyal et al. 2017, arXiv 1706.02677). The square root is derived in
    Malladi et al. 2022, arXiv 2205.10287 (for LAMB: You et al. 2020, arXiv 1904.00962).
    """
    adaptive = {"betas", "beta2_decay", "rho", "lr_decay"} & optimizer.defaults.keys()  # Adam's, Adafactor, Adadelta
    return "sqrt" if adaptive or type(optimizer).__name__ in ("RMSprop", "Muon") else "linear"


def scale(optimizer: Optimizer, batch_size: int, reference: int, rule: str | None = None) -> str:
    """Scale the rate of each group from the reference batch size to `batch_size`. Return the rule that was used.

    Weight decay that is multiplied by the rate (AdamW) is scaled too, so that weights shrink as much per example at any
    batch size (Wang and Aitchison 2024, arXiv 2405.13698).

    Args:
        optimizer: the optimizer, with the rates for `reference` examples per step.
        batch_size: examples per step.
        reference: examples per step for which the rates are quoted.
        rule: linear, sqrt or none; None: `default_rule`.
    """
    rule = rule or default_rule(optimizer)
    ratio = batch_size / reference
    factor = {"linear": ratio, "sqrt": sqrt(ratio), "none": 1.0}[rule]
    for group in optimizer.param_groups:
        group["lr"] *= factor
        if rule != "none" and _decays_by_the_rate(optimizer, group):
            group["weight_decay"] *= ratio / factor
    return rule


def _decays_by_the_rate(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    decoupled = group.get("decoupled_weight_decay", type(optimizer).__name__ in ("AdamW", "Lamb", "Adafactor", "Muon"))
    return bool(decoupled) and bool(group.get("weight_decay"))
