"""Text: every token is a target once, in each way of packing; the tokens on disk are whole, and found again."""

import errno
import json
import multiprocessing
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from batchwise.batching.loader import MicroBatch
from batchwise.models.transformer import Transformer
from batchwise.sources.text import Text

WORDS = ["a", "bc", "", "x" * 30, "hello world", "def f(): pass", "naïve", "y" * 7, "zz" * 9, "last one"]


@pytest.fixture(autouse=True)
def corpus() -> list[str]:
    Path("texts").mkdir()
    for number, text in enumerate(WORDS):
        Path(f"texts/{number}.txt").write_text(text)
    return WORDS


def make(**arguments) -> Text:
    return Text("texts/*.txt", **{"sequence_length": 8, "val_fraction": 0.0, "test_fraction": 0.0} | arguments)


def batch(data: Text, split: str = "train") -> MicroBatch:
    return data.transform(data.examples(split, 10_000), training=True)


def runs(targets: torch.Tensor) -> list[list[int]]:
    return [row[row >= 0].tolist() for row in targets]


@pytest.mark.parametrize("packing", [None, "cut", "best_fit"])
def test_each_token_and_each_end_is_a_target_once(packing: str | None) -> None:
    data = make(packing=packing)
    found = batch(data)
    inputs, targets = found.inputs, found.targets
    texts = [text.encode() for text in WORDS if text]
    counts = Counter(byte for text in texts for byte in text) | Counter({256: len(texts)})
    assert Counter(targets[targets >= 0].tolist()) == counts
    # The inputs are the targets one place later, behind a separator; and padding is where there is none.
    for row, before in zip(runs(targets), runs(inputs), strict=True):
        assert before == [256, *row[:-1]]
    assert torch.equal(inputs < 0, targets < 0)
    assert targets.shape[1] == 8


def test_cut_keeps_the_order_and_best_fit_keeps_sequences_whole() -> None:
    cut = [token for row in runs(batch(make(packing="cut")).targets) for token in row]
    assert bytes(token if token < 256 else 0 for token in cut) == b"".join(t.encode() + b"\0" for t in WORDS if t)
    ends = runs(batch(make(packing="best_fit")).targets)
    whole = [text for text in WORDS if 0 < len(text.encode()) < 8]
    packed = b"|".join(bytes(token if token < 256 else 0 for token in row) for row in ends)
    for text in whole:
        assert text.encode() + b"\0" in packed
    lengths = [len(run) for run in runs(batch(make()).targets)]
    assert len(ends) == 14  # the fewest possible
    assert sum(lengths) == 105
    assert len(lengths) == 17


def test_what_is_between_documents_is_known_to_the_network() -> None:
    tokens, documents = batch(make(packing="best_fit", document_mask=True)).inputs
    assert torch.equal(documents, (tokens == 256).cumsum(1))
    assert documents.min() == 1
    assert documents.max() > 1


def test_labels() -> None:
    Path("a.csv").write_text("text,stars\ngood,5\nbad,1\nfine,10\n,1\n" + f"{'long' * 9},5\n")
    data = Text("a.csv", label_column="stars", sequence_length=8, val_files="a.csv", test_fraction=0)
    found = batch(data)
    assert data.class_names == ["1", "5", "10"]  # whole numbers in their own order
    assert found.targets.tolist() == [1, 0, 2, 0, 1]
    assert runs(found.inputs) == [[256, *b"good"], [256, *b"bad"], [256, *b"fine"], [256], [256, *b"longlon"]]
    assert data.labels() is not None
    assert len(batch(data, "val")) == 5
    Path("a.csv").write_text("text,stars\ngood,Yes\nfine,yes\n")
    with pytest.raises(ValueError, match="column 'stars' has the labels 'Yes' and 'yes', which look like one"):
        Text("a.csv", label_column="stars", val_fraction=0, test_fraction=0).prepare_data()


def test_characters_are_those_of_the_training_documents() -> None:
    Path("other.txt").write_text("aQ")
    data = make(vocabulary="characters", val_files="other.txt")
    assert data.meta["characters"] == "".join(sorted(set("".join(WORDS))))
    unknown = len(data.meta["characters"])
    assert data.separator == unknown + 1
    assert runs(batch(data, "val").targets)[0][1:] == [unknown, unknown + 1]
    assert data.decode(batch(data, "val").targets[0]) == "a\ufffd<|end|>"


def test_the_tokens_are_written_once_and_again_when_a_file_changes(capsys: pytest.CaptureFixture) -> None:
    first = make()
    first.prepare_data()
    assert "train text: 105 tokens in 17 sequences" in capsys.readouterr().out
    same = make()
    assert same.folder == first.folder
    assert capsys.readouterr().out == ""
    assert str(same.split("train")) == "mapped"
    Path("texts/0.txt").write_text("b")
    os.utime("texts/0.txt", ns=(1, 1))
    changed = make()
    assert changed.folder != first.folder
    assert runs(batch(changed).targets)[0] == [ord("b"), 256]
    assert make(sequence_length=9).folder not in (first.folder, changed.folder)


def test_two_processes_that_start_at_once() -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)

    def start() -> None:
        barrier.wait()
        data = make(packing="best_fit")
        assert len(data.split("train")) == 14

    processes = [context.Process(target=start) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(Path(".cache").iterdir())) == 1  # and nothing half made


def test_a_write_that_fails_leaves_nothing() -> None:
    Path("texts/bad.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"bad.txt is not UTF-8 \(byte 0\)"):
        make().prepare_data()
    assert list(Path(".cache").iterdir()) == []


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").touch()
    with pytest.raises(ValueError, match=r"data\.cache file cannot be written \(File exists\): make room, or write"):
        make(cache="file").prepare_data()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("batchwise.sources.tokens._Split.finish", full)
    with pytest.raises(ValueError, match=r"data\.cache \.cache cannot be written \(No space left on device\)"):
        make().prepare_data()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_length": 1}, "data.sequence_length is 1: write a number of tokens of at least 2"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "leave no training examples"),
        ({"packing": "cut", "label_column": "label"}, "write packing: null"),
        ({"document_mask": True}, "data.document_mask is set, but sequences are not packed"),
    ],
)
def test_wrong_values(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_a_split_without_documents() -> None:
    Path("one.txt").write_text("all in one file\n\nand more")
    with pytest.raises(ValueError, match=r"data.files have 1 different documents, too few for train, val and test"):
        Text("one.txt").prepare_data()
    data = Text("one.txt", delimiter="\n\n", val_fraction=0.5, test_fraction=0)
    assert json.loads((data.folder / "meta.json").read_text())["splits"].keys() == {"train", "val"}


def test_a_network_that_knows_too_few_tokens() -> None:
    with pytest.raises(
        ValueError, match="knows 256 tokens, but the data has 257, with the separator: write vocab_size"
    ):
        make().check(Transformer(vocab_size=256, width=8, heads=2))
    make().check(Transformer(vocab_size=300, width=8, heads=2))
