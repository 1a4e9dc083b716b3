"""Tables: the rows of a CSV or Parquet file, with columns of numbers and categories."""

import warnings
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from batchwise.data.labels import check_alike, label_numbers, sorted_labels
from batchwise.data.split import ALIASES, Fractions
from batchwise.sources.columns import Column, form_of, is_text, numbers, stray, texts
from batchwise.sources.reading import read_table

if TYPE_CHECKING:
    from pyarrow import ChunkedArray
    from pyarrow import Table as ArrowTable

MOST_CATEGORIES = 1000
MOST_CLASSES = 20
"""Whole numbers, written with a decimal point, may be classes if there are at most so many."""


class Table(Fractions):
    """The rows of a CSV or Parquet file. One or several columns are to be predicted from the others.

    Inputs are [N, F] float32. A column of numbers is standardised with mean and std of the training split. A missing
    number becomes 0, which is the mean, and a second input marks it (if any is missing in the training split). A
    constant column is 0. A column of text is one-hot over the values of the training split. A missing text is a value
    of its own. A value that the training split does not have is 0 throughout.

    Targets are class numbers [N] of the sorted labels; or float32 [N], or [N, K] for several columns.

    Args:
        path: a .csv, .tsv or .parquet file, or a folder of Parquet files.
        target: the column to predict. Several columns give targets [N, K], for regression, or for several labels per
            example (0 and 1).
        target_kind: class or number; null: text is a class, a fraction is a number.
        categorical: columns of numbers that are names, such as postcodes.
        ignore: columns that are not inputs, such as identifiers.
        split_column: the column that says train, val or test; null: fractions are taken, of each class alike.
        delimiter: the character between the fields of a CSV file; null: it is found out.
        predict_path: file of the rows to predict, with or without the target; null: the rows of the test split.
        **kwargs: those of `Fractions`.
    """

    def __init__(
        self,
        path: str,
        target: str | list[str],
        target_kind: Literal["class", "number"] | None = None,
        categorical: list[str] | None = None,
        ignore: list[str] | None = None,
        split_column: str | None = None,
        delimiter: str | None = None,
        predict_path: str | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        if target_kind == "class" and not isinstance(target, str):
            raise ValueError(
                f"data.target {target} is several columns, which are numbers: write data.target_kind number"
            )
        self.path, self.predict_path, self.delimiter = path, predict_path, delimiter
        self.targets = [target] if isinstance(target, str) else target
        self.several = not isinstance(target, str)
        self.target_kind = target_kind
        self.categorical, self.ignore, self.split_column = categorical or [], ignore or [], split_column
        self.has_predict_split = predict_path is not None

    def load(self, split: str) -> tuple[Tensor, ...] | None:
        """Return inputs float32 [N, F] and targets, int64 or float32; just inputs for `predict_path`."""
        if split == "predict":
            assert self.predict_path is not None
            return (self._inputs(read_table(self.predict_path, self.delimiter)[0], self.predict_path),)
        index = self._index.get(split)
        return None if index is None else (self._all_inputs[index], self._all_targets[index])

    def learn(self) -> dict[str, Any]:
        """How each column becomes inputs, and the labels in the order of their numbers."""
        return {"columns": [column._asdict() for column in self._fitted], "labels": self._found_labels}

    def describe(self, index: Tensor) -> dict[str, list]:
        """Return the number of each row in its file, from 1."""
        return {"row": (index if self.has_predict_split else self._index["test"][index]).add(1).tolist()}

    @property
    def _labels(self) -> list | None:
        return self.learnt["labels"]

    @property
    def _columns(self) -> list[Column]:
        return [Column(**column) for column in self.learnt["columns"]]

    @property
    def class_names(self) -> list[str] | None:  # type: ignore[override]
        """The labels, in the order of their numbers; None if targets are numbers."""
        return None if self._labels is None else [str(label) for label in self._labels]

    @cached_property
    def _table(self) -> "ArrowTable":
        table, found = read_table(self.path, self.delimiter)
        for line in found:
            self.say(f"{self.path}: {line}")
        for key, names in {
            "target": self.targets,
            "categorical": self.categorical,
            "ignore": self.ignore,
            "split_column": [self.split_column] if self.split_column else [],
        }.items():
            for name in names:
                if name not in table.column_names:
                    some = ", ".join(table.column_names[:20])
                    raise ValueError(f"data.{key}: {self.path} has no column '{name}': write one of {some}")
        return table

    # Targets

    @cached_property
    def _found_labels(self) -> list | None:
        from pyarrow import types

        column = self._table[self.targets[0]]
        kind = self.target_kind or ("number" if self.several else None)
        if kind is None and types.is_floating(column.type):
            different = column.unique().drop_null().to_numpy()
            kind = None if len(different) <= MOST_CLASSES and (different == np.floor(different)).all() else "number"
        if kind is None and self._form(self.targets[0], column) is not None:
            kind = "number"
        if kind is None and not is_text(column) and not types.is_boolean(column.type):
            raise ValueError(
                f"the target '{self.targets[0]}' of {self.path} holds whole numbers: "
                "write data.target_kind class or number"
            )
        if kind == "number":
            return None
        labels = [value for value in column.unique().to_pylist() if value is not None]
        if not is_text(column):
            return sorted(labels)
        check_alike(labels, f"the target '{self.targets[0]}' of {self.path}")
        return sorted_labels(labels)

    @cached_property
    def _all_targets(self) -> Tensor:
        from pyarrow import compute

        for name in self.targets:
            missing = compute.is_null(self._table[name], nan_is_null=True).to_numpy()  # type: ignore[attr-defined]
            if missing.any():
                raise ValueError(
                    f"the target '{name}' of {self.path} is missing in {missing.sum():,} of {len(missing):,} rows, "
                    f"such as row {missing.argmax() + 1}: fill it in, or delete these rows"
                )
        known = self._labels if self.recalled else self._found_labels
        if known is not None:
            labels = self._table[self.targets[0]].to_pylist()
            return torch.from_numpy(label_numbers(labels, known, f"the target '{self.targets[0]}' of {self.path}"))
        columns = [
            numbers(self._table[name], name, self.path, self._form(name, self._table[name])) for name in self.targets
        ]
        targets = torch.from_numpy(np.column_stack(columns)).float()
        return targets if self.several else targets.squeeze(1)

    def _form(self, name: str, column: "ChunkedArray") -> str | None:
        """Return the form of the numbers or dates that the texts of a column stand for; None: they are names."""
        if not is_text(column) or name in self.categorical:
            return None
        values = [value for value in column.unique().to_pylist() if value is not None]
        try:
            form = form_of(values)
        except ValueError as error:
            raise ValueError(f"column '{name}' of {self.path} holds {error}: write them as 2024-12-31") from None
        if form is not None:
            self.say(f"{self.path}: column '{name}' holds {form}" + (", as days" if form.startswith("dates") else ""))
        return form

    # Splits

    @cached_property
    def _index(self) -> dict[str, Tensor]:
        if self.split_column is None:
            labels = torch.zeros(len(self._table)) if self._all_targets.is_floating_point() else self._all_targets
            return self.divide(labels)
        names = texts(self._table[self.split_column])
        for name in np.unique(names):
            if name not in ALIASES:
                raise ValueError(
                    f"data.split_column '{self.split_column}' of {self.path} holds '{name}': "
                    "write train, val or test there"
                )
        splits = np.array([ALIASES[name] for name in names])
        if "train" not in splits and not self.recalled:
            raise ValueError(f"no row of {self.path} is for training")
        return {split: torch.from_numpy((splits == split).nonzero()[0]) for split in np.unique(splits)}

    # Inputs

    @cached_property
    def _fitted(self) -> list[Column]:
        others = {*self.targets, *self.ignore, self.split_column}
        columns = [self._fit(name, self._table[name]) for name in self._table.column_names if name not in others]
        constant = [f"'{column.name}'" for column in columns if column.categories is None and not column.std]
        if constant:
            warnings.warn(
                f"the same in all training rows of {self.path}, and so of no use: {', '.join(constant)}", stacklevel=2
            )
        return columns

    def _fit(self, name: str, column: "ChunkedArray") -> Column:
        from pyarrow import types

        index, form = self._index["train"].numpy(), self._form(name, column)
        if types.is_nested(column.type):
            raise ValueError(f"column '{name}' of {self.path} holds lists: data.ignore leaves it out")
        if name in self.categorical or (is_text(column) and form is None):
            categories = np.unique(texts(column)[index]).tolist()
            if len(categories) > min(MOST_CATEGORIES, max(20, len(index) // 2)):
                wrong = stray(categories)
                hint = f"correct '{wrong}', which is no number or date; or " if wrong else ""
                raise ValueError(
                    f"column '{name}' of {self.path} has {len(categories):,} different values in {len(index):,} "
                    f"training rows: {hint}leave it out with data.ignore, or merge rare values"
                )
            return Column(name, categories=categories)
        if types.is_date(column.type) or types.is_timestamp(column.type):
            self.say(f"{self.path}: column '{name}' holds dates, as days")
        values = numbers(column, name, self.path, form)[index]
        known = values[~np.isnan(values)]
        if len(known) == 0 or known.min() == known.max():
            return Column(name, missing=len(known) < len(values) and len(known) > 0, form=form)
        return Column(name, known.mean(), known.std(), missing=len(known) < len(values), form=form)

    def _inputs(self, table: "ArrowTable", path: str) -> Tensor:
        columns = []
        for column in self._columns:
            if column.name not in table.column_names:
                raise ValueError(f"{path} has no column '{column.name}', which training had")
            values = table[column.name]
            is_name = column.categories is not None
            values = texts(values) if is_name else numbers(values, column.name, path, column.form)
            columns.append(column.inputs(values).astype(np.float32))
        return torch.from_numpy(np.concatenate(columns, 1))

    @cached_property
    def _all_inputs(self) -> Tensor:
        targets, inputs = self._all_targets, self._inputs(self._table, self.path)
        names = self.class_names
        what = f"{len(names)} classes: {', '.join(names[:10])}" if names else f"{targets[0].numel()} numbers to predict"
        self.say(f"{self.path}: {len(inputs):,} rows, {len(self._columns)} columns, {inputs.shape[1]} inputs, {what}")
        return inputs
