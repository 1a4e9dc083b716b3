"""Predictions as a file: one row per example, in order, from all devices."""

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class Predictions(Callback):
    """Writes `predictions.csv` into the run's folder: the example's number, then what the task predicts.

    Each device writes the rows of its own contiguous shard as they come, so memory stays flat; then they are joined.
    """

    def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open this device's part."""
        self.target = Path(trainer.default_root_dir) / "predictions.csv"
        self.file = self._part(trainer.global_rank).open("w", newline="")
        self.rows = csv.writer(self.file)

    def _part(self, rank: int) -> Path:
        return self.target.with_name(f".predictions.{rank}.part")

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the rows of one batch, under a header on the first device."""
        columns = {"example": outputs["index"], **columns_of(outputs["predictions"])}
        if trainer.is_global_zero and batch_idx == 0:
            self.rows.writerow(columns)
        self.rows.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Join the parts in the order of the devices, and put the file in its place."""
        self.file.close()
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        with self._part(0).open("ab") as whole:
            for rank in range(1, trainer.world_size):
                whole.write(self._part(rank).read_bytes())
                self._part(rank).unlink()
        self._part(0).replace(self.target)
        print(f"predictions: {self.target}")


def columns_of(predictions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return one column [N] per number that is predicted: [N, C] becomes `name_0` to `name_C-1`."""
    columns = {}
    for name, values in predictions.items():
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        if values.ndim == 1:
            columns[name] = values
        else:
            columns |= {f"{name}_{i}": column for i, column in enumerate(values.flatten(1).unbind(1))}
    return columns
