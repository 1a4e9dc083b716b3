"""The picture of what is taken for what."""

import numpy as np
import pytest
import torch
from helpers import DIGITS, run_here

from batchwise.callbacks import pictures


def test_a_cell_is_as_dark_as_its_share_of_its_row() -> None:
    picture = pictures.draw_confusion(torch.tensor([[8, 0], [2, 2]]))
    gray = picture.mean(axis=2)
    values, counts = np.unique(gray.round(), return_counts=True)
    common = dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert common[0.0] > 500  # 8 of 8
    (half,) = [value for value, count in common.items() if 100 < value < 200 and count > 1000]
    assert common[half] > 1.5 * common[0.0]  # twice 2 of 4


def test_it_counts_every_validation_example_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(pictures, "draw_confusion", lambda counts: drawn.append(counts) or np.zeros((2, 2, 3), "uint8"))
    result = run_here("fit", *DIGITS, "--trainer.max_epochs", 2)
    assert result.code == 0, result.err
    (counts,) = drawn
    assert counts.sum() == 269
    assert f"val/accuracy {counts.trace() / counts.sum():.4f}" in result.out.split("epoch 2 ")[1]
