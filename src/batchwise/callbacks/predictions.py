"""A file of predictions, with one row per example, in order, from all devices."""

import csv
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from batchwise.arguments import typed
from batchwise.batching.loader import MicroBatch
from batchwise.batching.structure import rebuild
from batchwise.errors import optional
from batchwise.host import check_writable, naming, whole
from batchwise.tasks.task import Task

Columns = dict[str, np.ndarray | list]


class Predictions(Callback):
    """Writes a row per example: its number, the columns of `data.describe`, and the predictions of the task.

    Each device writes the rows of its own contiguous shard batch by batch, so memory stays flat. At the end the parts
    are joined.

    Args:
        file: a name or path that ends in .csv or .parquet; a name alone is a file in the run's folder.
    """

    @typed
    def __init__(self, file: str = "predictions.csv") -> None:
        kinds = {".csv": CsvFile, ".parquet": ParquetFile}
        if Path(file).suffix not in kinds:
            raise ValueError(f"predictions is {file}: write a file that ends in .csv or .parquet")
        self.name, self.kind = file, kinds[Path(file).suffix]
        if self.kind is ParquetFile:
            optional("pyarrow", "table")
        self.file: Any = None
        self._writer = 0

    def path(self, trainer: pl.Trainer) -> Path:
        """Return the path of the file."""
        return Path("" if os.path.dirname(self.name) else trainer.default_root_dir, self.name)

    def check(self, trainer: pl.Trainer, inputs: Iterable[str], force: bool) -> None:
        """Refuse to replace a file that is an input of the run, or that `predict` did not write. Make its folder.

        Args:
            trainer: has the run's folder.
            inputs: values in the configuration, some of which may be paths.
            force: replace a file that `predict` did not write.

        Raises:
            ValueError: the file must not be replaced, or cannot be written.
        """
        path = self.path(trainer)
        check_writable("predictions", path)
        if not path.exists():
            return
        if path.is_dir():
            raise ValueError(f"predictions {path} is a folder: write the name of a file")
        if any(len(one) < 4096 and "\0" not in one and os.path.exists(one) and path.samefile(one) for one in inputs):
            raise ValueError(f"predictions {path} is an input of this run: write another name")
        if not force and self.kind.names(path)[:1] != ["example"]:
            raise ValueError(
                f"predictions {path} exists, and predict did not write it: write another name, or --force true"
            )

    def on_predict_start(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Open the file of this device."""
        self.target = self.path(trainer)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._writer = trainer.strategy.broadcast(os.getpid())  # another command may write the same file
        self.file = self.kind(self._part(trainer.global_rank), header=trainer.is_global_zero)

    def _part(self, rank: int) -> Path:
        return self.target.with_name(f".{self.target.name}.{self._writer}.{rank}.part")

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Task,
        outputs: dict,
        batch: MicroBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the rows of one batch."""
        data, index = pl_module.data, outputs["index"]
        predicted = columns_of(outputs["predictions"])
        columns: Columns = {"example": index.numpy(), **data.describe(index)}
        if data.class_names and "predicted" in predicted:
            names = dict(enumerate(data.class_names))  # the network may have more outputs
            columns["label"] = [names.get(int(number), str(number)) for number in predicted["predicted"]]
        with naming(self.target):
            self.file.write(columns | predicted)

    def on_exception(self, trainer: pl.Trainer, pl_module: Task, exception: BaseException) -> None:
        """Leave no part behind."""
        if self.file is not None:
            with suppress(OSError):  # the disk may be full
                self.file.close()
            for rank in range(trainer.world_size) if trainer.is_global_zero else [trainer.global_rank]:
                self._part(rank).unlink(missing_ok=True)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Join the parts in the order of the devices, and give the file its name."""
        with naming(self.target):
            self.file.close()
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            first, *others = (self._part(rank) for rank in range(trainer.world_size))
            if others:
                with naming(self.target):
                    self.kind.join(first, others)
            if trainer.fast_dev_run:  # type: ignore[attr-defined]
                first.unlink(missing_ok=True)
                print(f"trainer.fast_dev_run: a trial, which does not write {self.target.name}")
                return
            first.replace(self.target)
            print(f"predictions: {self.target}")


class CsvFile:
    """Writes rows to a CSV file. Only the first part has a line with the names."""

    @staticmethod
    def names(path: Path) -> list[str]:
        """Return the names of the columns of a file."""
        with path.open(newline="", errors="replace") as file:
            return next(csv.reader(file), [])

    def __init__(self, path: Path, header: bool) -> None:
        self.file, self.header = path.open("w", newline=""), header
        self.rows = csv.writer(self.file)

    def write(self, columns: Columns) -> None:
        """Write the rows of a batch."""
        if self.header:
            self.rows.writerow(columns)
            self.header = False
        lists = (
            column.tolist() if isinstance(column, np.ndarray) else map(_text, column) for column in columns.values()
        )
        self.rows.writerows(zip(*lists, strict=True))

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    @staticmethod
    def join(first: Path, others: list[Path]) -> None:
        """Append the others to the first, and remove them."""
        with first.open("ab") as whole:
            for part in others:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole)
                part.unlink()


def _text(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict | tuple) else value


class ParquetFile:
    """Writes rows to a Parquet file, at least `ROWS` at a time."""

    ROWS = 2**16

    @staticmethod
    def names(path: Path) -> list[str]:
        """Return the names of the columns of a file; none if it is not Parquet."""
        from pyarrow import ArrowException, parquet

        try:
            return parquet.read_schema(path).names
        except (OSError, ArrowException):
            return []

    def __init__(self, path: Path, header: bool) -> None:
        self.path, self.writer, self.waiting = path, None, []

    def write(self, columns: Columns) -> None:
        """Take the rows of a batch."""
        import pyarrow

        self.waiting.append(pyarrow.table(columns))
        if sum(map(len, self.waiting)) >= self.ROWS:
            self._write()

    def _write(self) -> None:
        import pyarrow

        table, self.waiting = pyarrow.concat_tables(self.waiting), []
        self.writer = self.writer or optional("pyarrow.parquet", "table").ParquetWriter(self.path, table.schema)
        self.writer.write_table(table)

    def close(self) -> None:
        """Write the remaining rows, and close the file."""
        if self.waiting:
            self._write()
        if self.writer:
            self.writer.close()

    @staticmethod
    def join(first: Path, others: list[Path]) -> None:
        """Append the others to the first, a group of rows at a time, and remove them."""
        from pyarrow import parquet

        with whole(first) as joined, parquet.ParquetWriter(joined, parquet.read_schema(first)) as writer:
            for part in (first, *others):
                with parquet.ParquetFile(part) as file:
                    for number in range(file.num_row_groups):
                        writer.write_table(file.read_row_group(number))
                part.unlink()


def columns_of(predictions: dict[str, Any]) -> Columns:
    """Return one column [N] per predicted number. [N, C] becomes `name_0` to `name_C-1`.

    What is nested in dicts and tuples becomes `name_key` and `name_0`. A list of one value per example becomes one
    column of nested lists, such as the boxes of each image; in a CSV file they are JSON.
    """
    columns: Columns = {}
    for name, values in predictions.items():
        if isinstance(values, dict):
            columns |= columns_of({f"{name}_{key}": item for key, item in values.items()})
        elif isinstance(values, tuple):
            names = getattr(values, "_fields", range(len(values)))
            columns |= columns_of({f"{name}_{key}": item for key, item in zip(names, values, strict=True)})
        elif isinstance(values, list):
            columns[name] = rebuild(values, lambda leaf: _array(leaf).tolist() if isinstance(leaf, Tensor) else leaf)
        elif (array := _array(values)).ndim == 1:
            columns[name] = array
        else:
            flat = array.reshape(len(array), -1)
            columns |= {f"{name}_{i}": flat[:, i] for i in range(flat.shape[1])}
    return columns


def _array(values: Tensor) -> np.ndarray:
    # NumPy has no bfloat16. Of float64 no digit is lost.
    wide = torch.promote_types(values.dtype, torch.float32) if values.is_floating_point() else values.dtype
    return values.detach().to(wide).cpu().numpy()
