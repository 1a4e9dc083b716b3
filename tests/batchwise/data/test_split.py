"""Splits by fractions: their sizes and classes, and what is refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchwise.data.split import Fractions, split_examples
from batchwise.sources.digits import read_digits

TAIL = torch.cat([torch.arange(100).repeat_interleave(3), torch.full((10,), 100)])


def sizes(labels: Tensor, val: float, test: float) -> list[int]:
    found = split_examples(labels, val, test, seed=0)
    assert torch.cat(list(found.values())).sort().values.equal(torch.arange(len(labels)))
    return [len(found[split]) for split in ("train", "val", "test")]


@pytest.mark.parametrize(
    ("labels", "first", "sums"),
    [
        (read_digits()[1], [[1, 2, 5, 6], [9, 41, 44, 47], [0, 3, 4, 12]], [943945966, 43345114, 44683733]),
        (
            torch.arange(3).repeat_interleave(50),
            [[0, 1, 2, 6], [11, 12, 14, 18], [3, 4, 5, 15]],
            [521331, 31254, 27547],
        ),
        (torch.zeros(442), [[0, 1, 2, 3], [12, 17, 29, 36], [9, 11, 19, 21]], [14423688, 603142, 631777]),
    ],
    ids=["digits", "equal classes", "no classes"],
)
def test_the_splits_of_published_figures_stay(labels: Tensor, first: list[list[int]], sums: list[int]) -> None:
    found = split_examples(labels, 0.15, 0.15, seed=0)
    assert [index[:4].tolist() for index in found.values()] == first
    assert [int((index * torch.arange(1, len(index) + 1)).sum()) for index in found.values()] == sums


def test_small_classes_do_not_change_the_sizes() -> None:
    assert sizes(TAIL, 0.15, 0.15) == [218, 46, 46]  # were 306, 2 and 2
    assert sizes(torch.arange(100).repeat(4), 0.15, 0.15) == [280, 60, 60]  # were 200, 100 and 100
    assert sizes(torch.arange(300), 0.1, 0.2) == [210, 30, 60]
    assert sizes(TAIL, 0.15, 0) == [264, 46, 0]
    assert split_examples(TAIL, 0.15, 0.15, seed=0)["val"].equal(split_examples(TAIL, 0.15, 0.15, seed=0)["val"])
    assert not split_examples(TAIL, 0.15, 0.15, seed=0)["val"].equal(split_examples(TAIL, 0.15, 0.15, seed=1)["val"])
    kept = split_examples(TAIL, 0.15, 0.15, seed=0)["train"]
    assert len(TAIL[kept].unique()) == 101  # no class of three loses all to validation and test
    few = split_examples(TAIL, 0.15, 0.15, seed=0, most_per_class=1)["train"]
    assert TAIL[few].tolist() == list(range(101))


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    fractions=st.tuples(st.floats(0.02, 0.45), st.floats(0.02, 0.45)),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=150, deadline=None)
def test_each_split_has_its_size_and_each_class_its_share(counts: list[int], fractions: tuple, seed: int) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    found = split_examples(labels, *fractions, seed=seed)
    assert torch.cat(list(found.values())).sort().values.equal(torch.arange(len(labels)))
    for split, fraction in zip(("val", "test"), fractions, strict=True):
        wanted = max(1, round(fraction * len(labels)))
        if len(labels) >= 10:
            assert abs(len(found[split]) - wanted) <= wanted / 5
    val = labels[found["val"]].bincount(minlength=len(counts))
    assert all(abs(int(n) - fractions[0] * count) <= 2 for n, count in zip(val, counts, strict=True))


@pytest.mark.parametrize("kind", [list, np.asarray, lambda labels: np.array(["no", "yes"])[labels], Tensor.bfloat16])
def test_labels_of_any_kind(kind: Any) -> None:
    labels = torch.arange(60) % 2
    found, right = (split_examples(given, 0.15, 0.2, seed=4) for given in (kind(labels), labels))
    assert all(found[split].equal(right[split]) for split in right)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([0, 1, math.nan, math.nan]), "2 of 4 labels to split by are missing: leave these examples out"),
        (np.array(["a", None, "b"], object), "1 of 3 labels to split by are missing"),
        ([1.0, math.nan], "1 of 2 labels to split by are missing"),
        (np.ma.masked_array([1, 2, 3], [False, True, False]), "1 of 3 labels to split by are missing"),
        (torch.eye(3)[torch.arange(9) % 3], r"are of shape \[9, 3\]: write one number or text for each .*argmax"),
        (torch.zeros(4, 1), r"are of shape \[4, 1\]"),
        ([[0], [0, 1]], "are rows of unequal length: write one"),
        ([], r"are of shape \[0\]"),
        (np.array([1, "a"], object), "are of several types: write one"),
    ],
)
def test_labels_that_lose_or_double_examples_are_refused(labels: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split_examples(labels, 0.15, 0.15, seed=0)


@pytest.mark.parametrize("fractions", [(1, 0), (15, 0.15), (-0.1, 0.15), (0.2, math.nan), (None, 0.1), (0.5, 0.5)])
def test_fractions_out_of_range_are_refused(fractions: Any) -> None:
    shown = ["null" if fraction is None else fraction for fraction in fractions]
    line = f"^data.val_fraction {shown[0]} and data.test_fraction {shown[1]} leave no training examples: write two "
    with pytest.raises(ValueError, match=line + "fractions from 0 that add up to less than 1$"):
        split_examples([0, 1] * 9, *fractions, seed=0)
    with pytest.raises(ValueError, match="^val_fraction is None: write a number$" if None in fractions else line):
        Nothing(*fractions)


@pytest.mark.parametrize("seed", [None, 2**70, -(2**63), 0.5])
def test_seeds_out_of_range_are_refused(seed: Any) -> None:
    line = f"^data.split_seed is {str(seed).replace('None', 'null')}: write a whole number below 2\\^63, such as 0$"
    with pytest.raises(ValueError, match=line):
        split_examples([0, 1] * 9, 0.1, 0.1, seed=seed)
    no_whole_number = seed in (None, 0.5)
    with pytest.raises(ValueError, match=f"^split_seed is {seed}: write a whole number$" if no_whole_number else line):
        Nothing(split_seed=seed)


class Nothing(Fractions):
    def load(self, split: str) -> None:
        return None
