"""Groups of parameters for an optimizer, with learning rates of their own or without weight decay."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern, such as `layers.1` or `*.bias`, matches a parameter's name or a module that has it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], lr_factors: dict[str, float], decay_matrices_only: bool
) -> list[dict[str, Any]]:
    """Return the groups, first those with the full rate. The caller removes `lr_factor` and multiplies the rate by it.

    Args:
        parameters: parameters with their names. Those that need no gradient are left out.
        lr_factors: factors on the learning rate by pattern (discriminative rates: Howard and Ruder 2018, "ULMFiT",
            arXiv 1801.06146). The first pattern that matches counts.
        decay_matrices_only: no weight decay for parameters with fewer than two dimensions.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            factor = next((factor for pattern, factor in lr_factors.items() if matches(name, pattern)), 1.0)
            groups.setdefault((factor, decay_matrices_only and parameter.ndim < 2), []).append(parameter)
    ordered = sorted(groups, key=lambda key: (key[0] != 1, -key[0], key[1]))
    return [
        {"params": groups[factor, bare], "lr_factor": factor} | ({"weight_decay": 0.0} if bare else {})
        for factor, bare in ordered
    ]
