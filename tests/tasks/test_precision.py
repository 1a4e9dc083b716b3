"""Data in the precision of the trainer."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from project.batching.loader import Batch
from project.data.module import DataModule
from project.tasks.classification import Classification
from project.trainer import Trainer


class Points(DataModule):
    """Floats that no `transform` touches."""

    seen: torch.dtype

    def load(self, split: str):
        return torch.randn(12, 3), torch.arange(12) % 2

    def transform(self, batch: Batch, training: bool) -> Batch:
        self.seen = batch.inputs.dtype
        return batch


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("64-true", torch.float64),
        ("bf16-true", torch.bfloat16),
        ("bf16-mixed", torch.float32),
    ],
)
def test_floats_come_in_the_precision_of_the_trainer(precision, dtype, tmp_path) -> None:
    data = Points(batch_size=4)
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=1,
        logger=CSVLogger(tmp_path),
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classification(nn.Linear(3, 2)), datamodule=data)
    assert data.seen == dtype
    assert trainer.global_step == 3
