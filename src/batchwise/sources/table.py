"""Tables: the rows of a CSV or Parquet file, with columns of numbers and categories."""

import warnings
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from batchwise.arguments import typed
from batchwise.data.labels import check_alike, label_numbers, sorted_labels
from batchwise.data.split import ALIASES, Fractions
from batchwise.sources.checking import check_column
from batchwise.sources.columns import (
    DATES,
    NO_NUMBERS,
    Column,
    Kind,
    described,
    is_list,
    is_text,
    kind_of,
    numbers,
    some,
    stray,
    texts,
    values_of,
)
from batchwise.sources.reading import read_table

if TYPE_CHECKING:
    from pyarrow import Table as ArrowTable

MOST_CATEGORIES = 1000
MOST_CLASSES = 20
"""Whole numbers, written with a decimal point or as texts, may be classes if there are at most so many."""


class Table(Fractions):
    """The rows of a CSV or Parquet file. One or several columns are to be predicted from the others.

    Inputs are [N, F] float32. A column of numbers is standardised with mean and std of the training split. A missing
    number becomes 0, which is the mean, and a second input marks it (if any is missing in the training split). A
    constant column is 0. A column of text is one-hot over the values of the training split. A missing text is a value
    of its own. A value that the training split does not have is 0 throughout.

    Targets are class numbers [N] of the sorted labels; or float64 [N], or [N, K] for several columns.

    Args:
        path: a .csv, .tsv or .parquet file, or a folder of Parquet files.
        target: the column to predict. Several columns give targets [N, K], for regression, or for several labels per
            example (0 and 1).
        target_kind: class or number; null: text is a class, a fraction is a number, and the rest must be said.
        columns: what columns hold, by name, where it is not what the run prints: category (such as postcodes), ignore
            (such as identifiers), number, thousands (1,234.5), decimal_comma (1.234,5), date (2024-12-31), day_first
            (31/12/2024) or month_first (12/31/2024).
        split_column: the column that says train, val or test; null: fractions are taken, of each class alike.
        delimiter: the character between the fields of a CSV file; null: it is found out.
        predict_path: file of the rows to predict, with or without the target; null: the rows of the test split.
        **kwargs: those of `Fractions`.
    """

    shares_learnt = True

    @typed
    def __init__(
        self,
        path: str,
        target: str | list[str],
        target_kind: Literal["class", "number"] | None = None,
        columns: dict[str, Kind] | None = None,
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
        self.columns, self.split_column = columns or {}, split_column
        self.has_predict_split = predict_path is not None

    def load(self, split: str) -> tuple[Tensor, ...] | None:
        """Return inputs float32 [N, F] and targets, int64 or float64; just inputs for `predict_path`."""
        if split == "predict":
            assert self.predict_path is not None
            table, _ = read_table(self.predict_path, self.delimiter, self._as_written)
            return (self._inputs(table, self.predict_path),)
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

    @property
    def _as_written(self) -> list[str]:
        """The columns that are texts in training: a file of fewer rows may hold what looks like other numbers."""
        return [one.name for one in self._columns if one.categories is not None or one.form == "decimal_comma"]

    @cached_property
    def _table(self) -> "ArrowTable":
        as_written = [name for name, kind in self.columns.items() if kind in ("category", "decimal_comma")]
        if self.recalled:
            as_written += self._as_written
            as_written += self.targets if self._labels and isinstance(self._labels[0], str) else []
        table, found = read_table(self.path, self.delimiter, as_written)
        for line in found:
            self.say(f"{self.path}: {line}")
        for key, names in {
            "target": self.targets,
            "columns": self.columns,
            "split_column": [self.split_column] if self.split_column else [],
        }.items():
            for name in names:
                if name not in table.column_names:
                    some = ", ".join(table.column_names[:20])
                    raise ValueError(f"data.{key}: {self.path} has no column '{name}': write one of {some}")
                if key == "target" and is_list(table[name]):
                    raise ValueError(
                        f"data.target: '{name}' of {self.path} holds lists: write each of their values into a column "
                        "of its own, and name all of these"
                    )
        return table

    # Targets

    @cached_property
    def _found_labels(self) -> list | None:
        from pyarrow import types

        name = self.targets[0]
        column, kind = self._table[name], self.target_kind or ("number" if self.several else None)
        if kind is None and not types.is_boolean(column.type) and (form := self._kind(name)) not in NO_NUMBERS:
            held = "dates or times" if form in DATES else "whole numbers"
            if held == "whole numbers" and not types.is_integer(column.type):
                different = np.unique(numbers(column, name, self.path, form))
                held = held if len(different) <= MOST_CLASSES and (different == np.floor(different)).all() else ""
            if held:
                raise ValueError(
                    f"the target '{name}' of {self.path} holds {held}: write data.target_kind class or number"
                )
            kind = "number"
        if kind == "number":
            return None
        labels = {value for value in values_of(column.unique()) if value is not None}
        if not is_text(column):
            return sorted(labels)
        check_alike(labels, f"the target '{self.targets[0]}' of {self.path}")
        return sorted_labels(labels)

    @cached_property
    def _all_targets(self) -> Tensor:
        for name in self.targets:
            check_column(self._table[name], f"the target '{name}' of {self.path}", "target")
        known = self._labels if self.recalled else self._found_labels
        if known is not None:
            name = self.targets[0]
            return label_numbers(values_of(self._table[name]), known, f"the target '{name}' of {self.path}")
        targets = torch.from_numpy(np.column_stack([self._numbers(name) for name in self.targets]))
        return targets if self.several else targets.squeeze(1)

    def _kind(self, name: str) -> Kind:
        try:
            return kind_of(self._table[name], self.columns.get(name))
        except ValueError as error:
            raise ValueError(f"data.columns: '{name}' of {self.path} holds {error}") from None

    def _numbers(self, name: str) -> np.ndarray:
        kind = self._kind(name)
        form = "number" if kind in NO_NUMBERS else kind
        values = numbers(self._table[name], name, self.path, form)
        if (missing := np.isnan(values)).any():  # a text that stands for it, such as a dash
            raise ValueError(
                f"the target '{name}' of {self.path} is missing in {missing.sum():,} of {len(values):,} rows, such as "
                f"row {missing.argmax() + 1}: fill it in, or filter these rows out"
            )
        return values

    # Splits

    @cached_property
    def _index(self) -> dict[str, Tensor]:
        if self.split_column is None:
            labels = torch.zeros(len(self._table)) if self._all_targets.is_floating_point() else self._all_targets
            return self.divide(labels)
        different, rows = texts(self._table[self.split_column])
        names = [name.strip().lower() for name in different]
        for name in sorted(names):
            if name not in ALIASES:
                raise ValueError(
                    f"data.split_column '{self.split_column}' of {self.path} holds '{name}': "
                    "write train, val or test there"
                )
        splits = np.array([ALIASES[name] for name in names])[rows]
        if "train" not in splits and not self.recalled:
            raise ValueError(f"no row of {self.path} is for training")
        return {split: torch.from_numpy((splits == split).nonzero()[0]) for split in np.unique(splits)}

    def _remedy(self, split: str) -> str:
        if self.split_column is None:
            return super()._remedy(split)
        return f" (write {split} for some rows in the column '{self.split_column}', which is data.split_column)"

    # Inputs

    @cached_property
    def _fitted(self) -> list[Column]:
        others = {*self.targets, *self._ignored, *([self.split_column] if self.split_column else [])}
        columns = [self._fit(name) for name in self._table.column_names if name not in others]
        constant = [f"'{column.name}'" for column in columns if column.categories is None and not column.std]
        if constant:
            warnings.warn(
                f"the same in all training rows of {self.path}, and so of no use: {some(constant)}", stacklevel=2
            )
        if not columns:
            raise ValueError(f"{self.path} has no column to predict from, beside '{', '.join(sorted(others))}'")
        return columns

    def _fit(self, name: str) -> Column:
        index, kind = self._index["train"].numpy(), self._kind(name)
        if kind == "category":
            different, rows = texts(self._table[name])
            categories = sorted(different[row] for row in np.unique(rows[index]))
            if len(categories) > min(MOST_CATEGORIES, max(20, len(index) // 2)):
                wrong = stray(categories)
                hint = f"correct '{wrong}', which is no number or date; or " if wrong else ""
                raise ValueError(
                    f"column '{name}' of {self.path} has {len(categories):,} different values in {len(index):,} "
                    f"training rows: {hint}leave it out with data.columns {{{name}: ignore}}, or merge rare values"
                )
            return Column(name, categories=categories)
        values = numbers(self._table[name], name, self.path, kind)[index]
        known = values[~np.isnan(values)]
        missing = len(known) < len(values)
        if len(known) == 0 or known.min() == known.max():
            return Column(name, missing=missing and len(known) > 0, form=kind)
        return Column(name, known.mean(), known.std(), missing=missing, form=kind)

    def _inputs(self, table: "ArrowTable", path: str) -> Tensor:
        columns, names = [], set(table.column_names)
        for column in self._columns:
            if column.name not in names:
                raise ValueError(f"{path} has no column '{column.name}', which training had")
            values = table[column.name]
            if column.categories is None:
                columns.append(column.inputs(numbers(values, column.name, path, column.form)).astype(np.float32))
                continue
            different, rows = texts(values)
            found = column.places(different)[rows]
            columns.append(column.inputs(found).astype(np.float32))
            if 2 * (unseen := found < 0).sum() > len(unseen):
                warnings.warn(
                    f"column '{column.name}' of {path} has in {unseen.sum():,} of {len(unseen):,} rows a value that "
                    f"training has not seen, such as '{different[rows[unseen.argmax()]]}'",
                    stacklevel=2,
                )
        return torch.from_numpy(np.concatenate(columns, 1))

    @cached_property
    def _all_inputs(self) -> Tensor:
        targets, inputs = self._all_targets, self._inputs(self._table, self.path)
        names = self.class_names
        what = f"{len(names)} classes: {', '.join(names[:10])}" if names else f"{targets[0].numel()} numbers to predict"
        self.say(f"{self.path}: {len(inputs):,} rows, {len(self._columns)} columns, {inputs.shape[1]} inputs, {what}")
        for line in described(self._columns, self._ignored):
            self.say(line)
        return inputs

    @property
    def _ignored(self) -> list[str]:
        return [name for name, kind in self.columns.items() if kind == "ignore"]
