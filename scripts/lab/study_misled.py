"""What does `tune` say where the gradient noise scale misleads? Four cases, with the digits.

- sorted: the data is sorted by class and is not shuffled, so that the parts of a batch are alike.
- wrong labels: one training label in five is wrong, so that there is noise that no batch averages away.
- the start: the rate is a hundredth of a good one, so that the network is still at its start.
- Muon: it normalises the gradient, whose plain norm does not matter.

    python scripts/lab/study_misled.py
"""

import contextlib
import io
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import study
import torch
from problems import OPTIMIZERS, ready
from study import FewDigits
from torch import Tensor

from batchwise.batching.order import Sequential, Shuffled
from batchwise.choosing import tune
from batchwise.choosing.advice import sentences
from batchwise.models.mlp import MLP
from batchwise.tasks.classification import Classification

ADAMW = partial(torch.optim.AdamW, lr=4e-3)


def by_class(digits: Tensor) -> Tensor:
    """Return the positions of the images, class by class."""
    return digits.argsort(stable=True)


CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "as it should be": (ADAMW, {}),
    "sorted": (ADAMW, {"choose": by_class, "order": Sequential()}),
    "wrong labels": (ADAMW, {"wrong": 0.2}),
    "the start": (partial(torch.optim.AdamW, lr=4e-5), {}),
    "Muon": (OPTIMIZERS["Muon"], {}),
}


def ask(optimizer: Callable[..., Any], settings: dict[str, Any], seed: int) -> tuple[float, float, str, str]:
    """Return the noise scale by the gradient, that of the short trainings, the recommendation, and other lines."""
    torch.manual_seed(seed)
    task = Classification(MLP(64, 10, [128]), optimizer=optimizer)
    data = FewDigits(**{"batch_size": 64, "seed": seed, "split_seed": seed, "order": Shuffled(), **settings})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        findings = tune.tune(ready(data, folder, 20), task, data, 0.25, None, {})
    advice, fitted, noise = findings.best(), findings.fitted(), findings.noise_scale()
    if advice is None or fitted is None:
        return noise or 0.0, 0.0, "none", ""
    said = sentences(findings, advice)
    return noise or 0.0, fitted.noise_scale, said[0], " ".join(line for line in said[2:] if line.startswith("these"))


def main() -> None:
    """Ask, and print the table."""
    given = study.arguments(__doc__, seeds=2)
    rows = []
    for name, (optimizer, settings) in study.few(given, CASES.items()):
        for seed in range(given.seeds):
            noise, critical, said, more = ask(optimizer, settings, seed)
            rows.append([f"{name}, seed {seed}", f"{noise:,.0f}", f"{critical:,.0f}", said, more or "-"])
    head = ["case", "by the gradient", "by the short trainings", "it recommends", "and says"]
    study.finish(given, None, misled=study.table("The noise scale, in examples", head, rows))


if __name__ == "__main__":
    main()
