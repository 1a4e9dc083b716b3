"""Texts as people have them: kinds of files, new texts without labels, unknown tokens, empty sequences."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet

from batchwise.batching.ragged import Ragged
from batchwise.data.module import DataModule
from batchwise.sources.documents import read
from batchwise.sources.text import Text
from batchwise.sources.vocabulary import Bytes, Characters

ROWS = [{"text": "one, two", "label": "a"}, {"text": "drei", "label": "b"}]
DELIMITED = {"csv": ",", "tsv": "\t"}


def write(path: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Write texts in the format that the ending of a path says."""
    kind, file = Path(path).suffix[1:].lower(), Path(path)
    if kind in ("parquet", "pq"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif kind in DELIMITED:
        lines = [list(rows[0]), *([f'"{value}"' for value in row.values()] for row in rows)]
        file.write_text("\n".join(DELIMITED[kind].join(line) for line in lines))
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize(
    "name", ["t.csv", "t.CSV", "t.tsv", "t.TSV", "t.jsonl", "t.JSONL", "t.ndjson", "t.parquet", "t.PARQUET", "t.pq"]
)
def test_kinds_of_files(name: str) -> None:
    found = list(read(write(name), "text", "label", None))
    assert [(one.text, one.label) for one in found] == [("one, two", "a"), ("drei", "b")]
    with pytest.raises(ValueError, match="has no 'title', but 'text', 'label': write"):
        list(read(Path(name), "title", None, None))


def test_a_broken_parquet_file() -> None:
    Path("t.parquet").write_text("text")
    with pytest.raises(ValueError, match=r"t\.parquet cannot be read as Parquet"):
        list(read(Path("t.parquet"), "text", None, None))


@pytest.mark.parametrize("token", [256, 257, 300, 319, 10**6])
def test_tokens_beyond_the_vocabulary(token: int) -> None:
    assert Bytes().decode([72, token, 105]) == "H\ufffdi"
    assert Bytes().decode([0xC3, 0xA9, token]) == "é\ufffd"
    characters = Characters("Hi")
    assert characters.decode([0, token, 1, 2]) == "H\ufffdi\ufffd"
    write("t.csv", [{"text": f"{n} words", "label": "ab"[n % 2]} for n in range(40)])
    for vocabulary in ("bytes", "characters"):
        data = Text("t.csv", vocabulary, batch_size=4)
        if token != data.separator:
            assert data.decode(torch.tensor([data.separator, token, -1])) == "<|end|>\ufffd"


def texts(count: int = 60) -> list[dict[str, Any]]:
    return [{"text": f"{'good' if n % 2 else 'bad'} number {n}", "label": ("no", "yes")[n % 2]} for n in range(count)]


def made(**settings: Any) -> Text:
    return Text(**{"files": "t.csv", "batch_size": 4, "val_fraction": 0.2, "test_fraction": 0.2} | settings)


@pytest.mark.parametrize("new", ["new.csv", "new.jsonl", "new.parquet", "new.txt"])
@pytest.mark.parametrize("label", ["label", None])
@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
def test_new_texts_need_no_training_texts(new: str, label: str | None, vocabulary: str) -> None:
    write("t.csv", texts())
    rows = [{"text": "good number 3"}, {"text": "neü"}]
    if new.endswith(".txt"):
        Path(new).write_text("\n\n".join(row["text"] for row in rows))
    else:
        write(new, rows)
    more: dict[str, Any] = {"label_column": label, "vocabulary": vocabulary, "delimiter": "\n\n"}
    train = made(**more)
    train.setup("fit")
    state = train.state_dict()
    Path("t.csv").unlink()
    data = made(**more, predict_path=new)
    data.recall(state)
    data.setup("predict")
    batch = data.to_device(data.examples("predict", 9), torch.device("cpu"), training=False)
    assert len(batch) == 2
    assert data.class_names == (["no", "yes"] if label else None)
    if label:
        assert data.describe(torch.tensor([1, 0])) == {"text": ["neü", "good number 3"]}
        assert batch.targets is None
        first = batch.inputs[0][batch.inputs[0] >= 0]
        assert data.decode(first) == "<|end|>good number 3"
    else:
        assert data.decode(batch.targets[0]) == "good number 3<|end|>"
        assert data.describe(torch.tensor([0])) == {}
    assert ("\ufffd" in data.decode(batch.inputs[1])) == (vocabulary == "characters")


def test_an_empty_text_is_predicted_like_the_others() -> None:
    """It is a row of the file, and has a label in training: without it, predictions stand beside other rows."""
    write("t.csv", texts())
    write("new.csv", [{"text": text, "stars": 1} for text in ("good", "", "bad")])
    data = made(label_column="label", predict_path="new.csv")
    data.setup("predict")
    batch = data.examples("predict", 9)
    assert data.describe(torch.arange(3)) == {"text": ["good", "", "bad"]}
    assert batch.inputs[1].tolist() == [data.separator, -1, -1, -1, -1]


def test_no_new_texts() -> None:
    write("t.csv", texts())
    Path("empty.txt").touch()
    for path, words in (
        ("empty.txt", "data.predict_path empty.txt has no text"),
        ("none.txt", "data.predict_path none"),
    ):
        with pytest.raises(ValueError, match=words):
            made(predict_path=path).load("predict")


@pytest.mark.parametrize("places", [[0], [5], [9], [0, 1, 4, 8, 9]])
def test_an_empty_sequence_is_refused_dropped_or_kept(places: list[int]) -> None:
    class Sequences(DataModule):
        def __init__(self, empty: Any) -> None:
            super().__init__(batch_size=4)
            self.empty = empty

        def load(self, split: str) -> Any:
            lengths = torch.arange(2, 12)
            lengths[places] = 0
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
            return Ragged(torch.arange(int(offsets[-1])), offsets, torch.arange(10), empty=self.empty)

    words = f"example {places[0]} of the train split has no values .{len(places)} are empty., .* write Ragged"
    with pytest.raises(ValueError, match=words):
        Sequences("refuse").setup("fit")
    kept, dropped = Sequences("keep"), Sequences("drop")
    kept.setup("fit")
    dropped.setup("fit")
    some = [number for number in range(10) if number not in places]
    every, fewer = kept.examples("train", torch.tensor(some)), dropped.examples("train", 10)
    assert len(fewer) == len(some)
    assert torch.equal(fewer.inputs, every.inputs)
    assert fewer.targets.tolist() == some
