"""The picture of what is taken for what."""

import numpy as np
import pytest
import small
import torch
from helpers import DIGITS, run_here
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from batchwise.callbacks import pictures
from batchwise.tasks.classification import Classification


def test_a_cell_is_as_dark_as_its_share_of_its_row() -> None:
    picture = pictures.draw_confusion(torch.tensor([[8, 0], [2, 2]]))
    gray = picture.mean(axis=2)
    values, counts = np.unique(gray.round(), return_counts=True)
    common = dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert common[0.0] > 500  # 8 of 8
    (half,) = [value for value, count in common.items() if 100 < value < 200 and count > 1000]
    assert common[half] > 1.5 * common[0.0]  # twice 2 of 4


@pytest.mark.weekly
def test_it_counts_every_validation_example_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(pictures, "draw_confusion", lambda counts: drawn.append(counts) or np.zeros((2, 2, 3), "uint8"))
    result = run_here("fit", *DIGITS, "--trainer.max_epochs", 2)
    assert result.code == 0, result.err
    (counts,) = drawn
    assert counts.sum() == 269
    assert f"val/accuracy {counts.trace() / counts.sum():.4f}" in result.out.split("epoch 2 ")[1]


class Images(small.Points):
    def load(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x.view(-1, 1, 1, 5), self.y


def test_a_part_in_evaluation_mode_stays_so() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(5, 8), nn.Dropout(0.0), nn.Linear(8, 3)).double()
    network[2].eval()
    task, made = small.fit(Classification(network), Images(), logger=TensorBoardLogger("."), max_epochs=1)
    assert any(isinstance(one, pictures.Pictures) for one in made.callbacks)
    assert task.training
    assert not network[2].training
