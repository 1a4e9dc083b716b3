"""`inspect` shows text as text: lengths, padding, what it says, and copies whatever stands beside them."""

import re
from pathlib import Path

import pytest
import torch
from helpers import CSV, run_here

from batchwise.choosing.look import hashes
from batchwise.choosing.sequences import Sequences

MODEL = "{class_path: batchwise.models.transformer.Transformer, init_args: {width: 8, depth: 1, heads: 2%s}}"


def test_lengths_and_padding() -> None:
    seen = Sequences()
    seen.add(torch.tensor([[5, 1, -1, -1], [7, 7, 7, 7]]))
    seen.add(torch.tensor([[1, 2, 3]]))
    assert seen.figures() == {
        "tokens per sequence": "2 to 4, mean 3.0, median 3",
        "padding": "18.2% of the tokens in micro-batches",  # 2 of 11
    }


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_a_sequence_is_the_same_whatever_stood_beside_it(dtype: torch.dtype) -> None:
    (short,) = hashes(torch.tensor([[5, 255]], dtype=dtype))
    padded, longer, other = hashes(torch.tensor([[5, 255, -1, -1], [5, 255, 0, -1], [5, 511, -1, -1]], dtype=dtype))
    assert short == padded
    assert len({padded, longer, other}) == 3


@pytest.mark.slow
def test_inspect_shows_text() -> None:
    texts = [f"{'so ' * (number % 7)}[number] {number}" for number in range(90)]
    Path("train.csv").write_text("text,label\n" + "".join(f"{text},{len(text) % 2}\n" for text in [*texts, texts[3]]))
    Path("val.csv").write_text(f"text,label\nnew,0\nand a long one that is as wide as none before it,1\n{texts[5]},1\n")
    run = (
        "inspect", *CSV, "--seconds", 2, "--trainer.accelerator", "cpu", "--data", "batchwise.sources.text.Text",
        "--data.files", "train.csv", "--data.val_files", "val.csv", "--data.test_fraction", 0, "--data.batch_size", 16,
        "--data.label_column", "label", "--model", "batchwise.tasks.classification.Classification",
        "--model.network", MODEL % ", num_classes: 2",
    )  # fmt: skip
    result = run_here(*run)
    assert result.code == 0, result.err
    found = [line for line in result.out.splitlines() if line.startswith("found: ")]
    assert found[0] == "found: 1 of 91 train examples are copies, such as 90 of 3"
    assert found[1] == "found: 1 of 3 val examples are in train too, such as 2, which is 5 there"
    assert not any("column" in line or "one value" in line for line in found)
    text = re.sub(r"\s+", " ", result.out)
    assert "tokens per sequence 11 to 30, mean" in text
    assert re.search(r"padding [1-9]\d\.\d% of the tokens in micro-batches", text)
    assert re.search(r"\d+ <\|end\|>(so )*\[number\] \d+ ", text)
    assert (result.folder / "inspect.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_shows_blocks_of_a_language_model() -> None:
    Path("texts.txt").write_text("\n\n".join(f"a short text, {number}" for number in range(200)))
    result = run_here(
        "inspect", *CSV, "--seconds", 2, "--trainer.accelerator", "cpu", "--data", "batchwise.sources.text.Text",
        "--data.files", "texts.txt", "--data.delimiter", "\n\n", "--data.packing", "best_fit", "--data.batch_size", 8,
        "--data.sequence_length", 64, "--data.document_mask", "true", "--model", "batchwise.tasks.language.Language",
        "--model.network", MODEL % "",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert result.out.count("<|end|>a short text, ") >= 8
    assert "tokens per sequence" in result.out
