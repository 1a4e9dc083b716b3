"""A resume on other examples is noticed, on one machine or another."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CSV, DIGITS, TWO, run_here, run_process
from small import Classify, Points, adamw, fit, network
from torch import Tensor

from batchwise import DataModule
from batchwise.batching.fetch import make_fetch
from batchwise.batching.ragged import Ragged
from batchwise.data import contents
from batchwise.data.contents import contents_of, others
from batchwise.errors import Mistake
from batchwise.run.python import Trainer

generator = torch.Generator().manual_seed(0)
X = torch.randn(300, 5, generator=generator)
Y = torch.arange(300) % 3
OFFSETS = torch.arange(0, 301 * 3, 3)
TEXTS = [f"text {number}" for number in range(300)]


def differs(one: Any, other: Any) -> list[str]:
    return list(others("train", contents_of(make_fetch(one)), contents_of(make_fetch(other))))


def changed(values: Any, place: Any, value: Any) -> Any:
    copy = values.copy() if isinstance(values, list | np.ndarray) else values.clone()
    copy[place] = value
    return copy


swapped = torch.arange(300)
swapped[[10, 250]] = swapped[[250, 10]]
CHANGES: dict[str, tuple[Any, Any, str]] = {
    "labels turned": ((X, Y), (X, Y.roll(1)), "targets"),
    "a label": ((X, Y), (X, changed(Y, 123, 2)), "targets"),
    "a value": ((X, Y), (changed(X, (7, 2), 100.0), Y), "inputs"),
    "a small value": ((X, Y), (changed(X, (7, 2), X[7, 2] + 0.01), Y), "inputs"),
    "a missing value": ((X, Y), (changed(X, (7, 2), np.nan), Y), "inputs"),
    "twice the inputs": ((X, Y), (X * 2, Y), "inputs"),
    "rows reversed": ((X, Y), (X.flip(0), Y.flip(0)), "inputs"),
    "two rows swapped": ((X,), (X[swapped],), "inputs"),
    "whole numbers": ((Y,), (Y.int(),), "inputs"),
    "a dict": (({"a": X, "b": Y}, Y), ({"a": X, "b": changed(Y, 0, 2)}, Y), "inputs['b']"),
    "texts": ((TEXTS, Y), (changed(TEXTS, 3, "another"), Y), "inputs"),
    "tensors of unequal shapes": (([*X.split(1)],), (changed([*X.split(1)], 4, torch.zeros(2, 5)),), "inputs"),
    "sequences": (Ragged(X.repeat(3, 1), OFFSETS), Ragged(changed(X.repeat(3, 1), 100, 9.0), OFFSETS), "inputs"),
    "a field more": ((X, Y), ({"x": X}, Y), "inputs"),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.slow
def test_changes_are_noticed(case: str) -> None:
    old, new, where = CHANGES[case]
    assert differs(old, old) == []
    assert any(where in line and "are not as they were" in line for line in differs(old, new))
    assert differs(new, new) == []


def test_rounding_is_none() -> None:
    noise = 1 + 1e-7 * torch.randn(300, 5, generator=generator, dtype=torch.float64)
    for other in (X.double() * noise, X.double(), X.bfloat16(), X.half(), X.numpy()):
        assert differs((X, Y), (other, Y)) == []
    wide = X.double().where(X < 1, -1.797e308).where(X > -1, torch.inf)
    assert differs((wide,), (wide.clone(),)) == []
    for kind in (torch.complex64, torch.complex32):
        assert differs((X.to(kind),), (X.to(kind),)) == []
    assert differs((X,), (torch.cat([X, X[:1]]),)) == ["the train split: 300 -> 301 examples"]


def test_some_of_many_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    fetch = make_fetch((X, Y))
    stream = fetch.stream
    monkeypatch.setattr(
        fetch, "stream", lambda requests: stream(read.append(len(one.index)) or one for one in requests)
    )
    contents_of(fetch)
    assert sum(read) >= 300
    read.clear()
    monkeypatch.setattr(contents, "_BUDGET", 100 * 48)  # bytes, of which an example has 48, as doubles
    few = contents_of(fetch)
    assert sum(read) == 2 * 64 + 100
    assert list(others("train", few, contents_of(make_fetch((X * 1.01, Y)))))


class Odd:
    """Whose text has its address."""


def test_values_that_may_be_written_otherwise_are_not_compared() -> None:
    def made() -> list[Any]:
        return [{"odd": Odd(), "set": frozenset("abc"), "text": text} for text in TEXTS]

    assert differs((made(),), (made(),)) == []
    other = made()
    other[5]["text"] = "another"
    assert differs((made(),), (other,))


def test_a_file_may_be_mapped_or_read() -> None:
    np.save("x.npy", X.numpy())
    for mode in ("r", None):
        for other in ("r", None):
            assert differs((np.load("x.npy", mmap_mode=mode),), (np.load("x.npy", mmap_mode=other),)) == []
    turned = (X.flip(0).numpy(),)
    assert differs((np.load("x.npy", mmap_mode="r"),), turned)


def test_many_values_of_python_are_not_all_looked_at() -> None:
    def read(leaves: list[Any]) -> int:
        made = contents_of(make_fetch((leaves,)))
        assert made is not None
        return max(made["samples"])

    assert read(["text"] * 20_000) == 2**14
    assert 64 < read(["a" * 2**17] * 1000) < 600


def test_windows_count_by_what_they_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_BUDGET", 2**16)
    windows = torch.arange(10_000).unfold(0, 64, 1)
    made = contents_of(make_fetch((windows,)))
    assert made is not None
    assert made["examples"] == 9_937
    assert list(others("train", made, contents_of(make_fetch((torch.arange(1, 10_001).unfold(0, 64, 1),)))))


def test_what_is_read_elsewhere_has_none() -> None:
    class Own(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Tensor:
            raise AssertionError("it is not to be read")

    assert contents_of(make_fetch(Own())) is None
    assert list(others("train", None, contents_of(make_fetch((X,))))) == []


class Other(Points):
    """With other examples in a split."""

    def __init__(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], which: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.change, self.which = change, which

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        x, y = super().load(split)
        return self.change(x, y) if split == self.which else (x, y)


Other.__qualname__ = "Points"  # it stands for the same data module


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.slow
def test_a_training_does_not_go_on_with_other_examples(split: str) -> None:
    def trainer(epochs: int) -> Trainer:
        return Trainer(
            logger=False, max_epochs=epochs, precision="64-true", accelerator="cpu", enable_progress_bar=False
        )

    def task() -> Classify:
        return Classify(network(), optimizer=adamw)

    trainer(1).fit(task(), Points())
    other = Other(lambda x, y: (x, y.roll(1)), split)
    with pytest.raises(Mistake, match=rf"the {split} split: targets are not as they were.*fit\(\.\.\., force=True"):
        trainer(2).fit(task(), other, ckpt_path="last")
    if split == "val":
        longer = Other(lambda x, y: (x[:60], y[:60]), split)
        with pytest.raises(Mistake, match="the val split: 64 -> 60 examples"):
            trainer(2).fit(task(), longer, ckpt_path="last")
    forced = trainer(2)
    forced.fit(task(), other, ckpt_path="last", force=True)
    assert forced.current_epoch == 2
    again = trainer(3)
    again.fit(task(), Other(lambda x, y: (x, y.roll(1)), split), ckpt_path="last")
    assert again.current_epoch == 3


def test_micro_batches_and_precision_change_no_contents() -> None:
    def summary(**settings: Any) -> dict[str, Any]:
        data: DataModule = Points(micro_batch_size=settings.pop("micro", None))
        fit(data=data, max_steps=1, **settings)
        return data.contents()

    whole = summary()
    for settings in ({"micro": 3}, {"limit_val_batches": 1}, {"limit_train_batches": 2}):
        assert summary(**settings) == whole


@pytest.mark.slow
def test_a_table_that_changes_is_refused_until_forced() -> None:
    rows = [(number, number % 7, "ab"[number % 2]) for number in range(60)]

    def write(swapped: bool) -> None:
        lines = [f"{a},{b},{label}" for a, b, label in rows]
        if swapped:
            lines[10], lines[30] = lines[30], lines[10]
        with open("t.csv", "w") as file:
            file.write("\n".join(["a,b,label", *lines]))

    write(False)
    run = ("fit", "--data", "batchwise.sources.table.Table", "--data.path", "t.csv", "--data.target", "label")
    run = (*run, "--data.batch_size", 8, "--model", "batchwise.tasks.classification.Classification")
    run = (
        *run,
        "--model.network",
        "batchwise.models.mlp.MLP",
        "--model.network.in_features",
        2,
        "--trainer.accelerator",
        "cpu",
        *CSV,
    )
    first = run_here(*run, "--trainer.max_epochs", 1)
    assert first.code == 0, first.err
    write(True)
    changed = run_here(*run, "--trainer.max_epochs", 2, "--ckpt_path", "last")
    assert changed.code == 2
    assert "it has learnt columns[0]['mean'] " in changed.err
    assert "go on with what was learnt (force)" in changed.err
    assert len(changed.err) < 300
    assert len(changed.err.strip().splitlines()) == 1
    forced = run_here(*run, "--trainer.max_epochs", 2, "--ckpt_path", "last", "--force", "true")
    assert forced.code == 0, forced.err
    seed = run_here(*run, "--trainer.max_epochs", 3, "--ckpt_path", "last", "--data.split_seed", 5)
    assert seed.code == 2
    assert "data.split_seed: 0 -> 5" in seed.err
    assert "learnt" not in seed.err
    split = run_here(
        *(*run, "--trainer.max_epochs", 3, "--ckpt_path", "last", "--data.split_seed", 5), "--force", "true"
    )
    assert split.code == 0, split.err


OWN = """
import os
import torch
from batchwise.sources.digits import Digits

class Own(Digits):
    def load(self, split):
        images, labels = super().load(split)
        drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(os.getpid()))
        if split == "train":
            if os.environ["OWN"] == "shuffled":
                return images[drawn], labels[drawn]
            if os.environ["OWN"] == "of unequal length":
                return images[: 1000 + os.getpid() % 200], labels[: 1000 + os.getpid() % 200]
        return images, labels
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("the same", None),
        ("shuffled", "process 0 and process 1 differ in the train examples"),
        ("of unequal length", r"process 0 and process 1 differ in the number of train examples \(1\d+ and 1\d+\)"),
    ],
)
def test_other_examples_in_another_process_are_refused(how: str, says: str | None) -> None:
    """They would train, each on its own. Nothing said so."""
    Path("own.py").write_text(OWN)
    result = run_process(
        "fit", *DIGITS, *CSV, *TWO, "--data", "own.Own", "--data.batch_size", 64, "--trainer.max_epochs", 1, OWN=how
    )
    assert result.code == (2 if says else 0), result.err
    if says:
        (line,) = (line for line in result.err.splitlines() if "differ in" in line)
        assert re.search(says + ".*seed what they draw", line)
