"""The optimizer's settings follow the batch size. They are given for one batch size and used at another."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from torch.optim import Optimizer

RULES = ("linear", "sqrt", "none")
FOLLOWING = {
    "weight_decay": "arXiv 2405.13698",
    "beta2": "arXiv 2507.07101",
    "eps": "arXiv 2205.10287",
    "momentum": "arXiv 2205.10287",
}
"""Settings beside the rate that follow the batch, and the source of the rule."""
_RATE = {"linear": "arXiv 1706.02677", "sqrt": "arXiv 2205.10287"}


def default_rule(optimizer: Optimizer) -> str:
    """Return "sqrt" for adaptive optimizers and Muon, whose step size does not depend on the gradient's scale.

    For all others, such as SGD, return "linear" (Goyal et al. 2017, arXiv 1706.02677). The square root is derived in
    Malladi et al. 2022, arXiv 2205.10287 (for LAMB: You et al. 2020, arXiv 1904.00962).
    """
    adaptive = {"betas", "beta2_decay", "rho", "lr_decay"} & optimizer.defaults.keys()  # Adam's, Adafactor, Adadelta
    return "sqrt" if adaptive or type(optimizer).__name__ in ("RMSprop", "Muon") else "linear"


@dataclass(frozen=True)
class Scaling:
    """How settings follow the batch, when it is k times the one that they are given for.

    - The rate is multiplied by k or by its square root; beyond `limit` it stays (Li et al. 2024, arXiv 2405.14578;
      McCandlish et al. 2018, arXiv 1812.06162).
    - Weight decay that is multiplied by the rate: weights shrink as much per example (Wang and Aitchison 2024, arXiv
      2405.13698).
    - beta2 of Adam and its kin, alpha of RMSprop: to the power k, so that the half-life of the mean of squares stays in
      examples (Marek et al. 2025, arXiv 2507.07101). It does not go below beta1.
    - eps of the same: divided by the square root of k, as the noise of the gradient (Malladi et al. 2022, arXiv
      2205.10287).
    - momentum of SGD: to the power k, so that its half-life stays in examples, too. PyTorch adds whole gradients, so
      the rate is multiplied by (1 - momentum after) / (1 - momentum before).

    Args:
        reference: the batch size for which the settings are given; None: nothing follows.
        rule: linear, sqrt or none, for the rate; None: `default_rule`. With none, nothing follows.
        limit: batch size beyond which the rate stays, such as the noise scale; None: there is no such size.
        keeps: the settings of `FOLLOWING` that do not follow; None: `momentum`.

    Raises:
        ValueError: the rule or a setting is not known, a number makes no sense, or there is no reference.
    """

    reference: int | None = None
    rule: str | None = None
    limit: int | None = None
    keeps: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.reference is not None and self.reference < 1:
            raise ValueError(f"model.reference_batch_size is {self.reference}: write a number of examples")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"model.scaling_limit is {self.limit}: write a number of examples, or null")
        if self.rule not in (None, *RULES):
            raise ValueError(f"model.scaling is {self.rule}: write {', '.join(RULES)}, or null")
        if unknown := set(self.keeps or ()) - FOLLOWING.keys():
            raise ValueError(f"model.scaling_keeps has {min(unknown)}: write some of {', '.join(FOLLOWING)}")
        given = {"scaling": self.rule, "scaling_limit": self.limit, "scaling_keeps": self.keeps}
        if self.reference is None and (name := next((name for name in given if given[name] is not None), None)):
            raise ValueError(f"model.{name} is set, but model.reference_batch_size is not set: write it too")

    def apply(self, optimizer: Optimizer, batch_size: int) -> list[str]:
        """Set the settings of all groups, which are those of the reference. Return a line for each that follows.

        Args:
            optimizer: the optimizer.
            batch_size: examples per step.
        """
        rule = self.rule or default_rule(optimizer)
        if self.reference in (None, batch_size) or rule == "none":
            return []
        lines: dict[str, str] = {}
        for group in optimizer.param_groups:
            for name, (key, value, source) in self._changes(optimizer, group, batch_size, rule).items():
                old, new = (each[1] if isinstance(each, tuple) else each for each in (group[key], value))
                line = f"{name} {old:.4g} at {self.reference} examples per step is {new:.4g} at {batch_size} ({source})"
                if value != group[key]:
                    lines.setdefault(name, line)
                group[key] = value
        return list(lines.values())

    def _changes(
        self, optimizer: Optimizer, group: dict[str, Any], batch_size: int, rule: str
    ) -> dict[str, tuple[str, Any, str]]:
        """Return the changes of a group, by the names of the rules: each the key, its new value, and a source."""
        assert self.reference is not None
        ratio, most = batch_size / self.reference, self.limit or max(batch_size, self.reference)
        growth = min(batch_size, most) / min(self.reference, most)
        factor = growth if rule == "linear" else sqrt(growth)
        keeps = ("momentum",) if self.keeps is None else self.keeps
        kind = type(optimizer).__name__
        found: dict[str, tuple[str, Any]] = {}
        if _decays_by_the_rate(kind, group):
            found["weight_decay"] = ("weight_decay", group["weight_decay"] * ratio / factor)
        if "betas" in group and "eps" in group and kind != "Adamax":
            first, second, *more = group["betas"]
            found["beta2"] = ("betas", (first, max(second**ratio, min(first, second)), *more))
            found["eps"] = ("eps", group["eps"] / sqrt(ratio))
        elif kind == "RMSprop":
            found["beta2"] = ("alpha", group["alpha"] ** ratio)
            found["eps"] = ("eps", group["eps"] / sqrt(ratio))
        elif kind == "SGD" and group["momentum"]:
            found["momentum"] = ("momentum", group["momentum"] ** ratio)
        found = {name: change for name, change in found.items() if name not in keeps}
        if "momentum" in found:
            factor *= (1 - found["momentum"][1]) / (1 - group["momentum"])
        others = {name: (*change, FOLLOWING[name]) for name, change in found.items()}
        return {"learning rate": ("lr", group["lr"] * factor, f"model.scaling {rule}, {_RATE[rule]}"), **others}


def _decays_by_the_rate(kind: str, group: dict[str, Any]) -> bool:
    """Return whether a step shrinks the weights by rate x decay. Of Adam with plain L2, a step does not."""
    by_class = kind in ("AdamW", "Lamb", "Adafactor", "Muon", "SGD")
    decoupled = group.get("decoupled_weight_decay", group.get("weight_decouple", by_class))
    return bool(decoupled) and bool(group.get("weight_decay"))
