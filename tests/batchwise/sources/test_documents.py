from pathlib import Path

import pytest

from batchwise.sources.documents import Document, find_files, key_of, read, split_keys


def documents(
    name: str, content: str | bytes, label: str | None = None, delimiter: str | None = None
) -> list[Document]:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read(Path(name), "text", label, delimiter))


def test_plain_text() -> None:
    assert documents("a.txt", "one\r\n\n\ntwo") == [Document("one\r\n\n\ntwo")]
    assert documents("a.txt", "one\n\n\n\ntwo\n\n", delimiter="\n\n") == [Document("one"), Document("two")]
    windows = "one\r\n\r\ntwo\r\n"
    assert documents("a.txt", windows, delimiter="\n\n") == [Document("one"), Document("two\r\n")]
    assert documents("a.txt", "\ufeffone\ufeff") == [Document("one\ufeff")]
    assert documents("a.txt", "") == []


def test_rows() -> None:
    table = '\ufefftext,label\n"a, b\nc",pos\n,neg\n'
    assert documents("a.csv", table, "label") == [Document("a, b\nc", "pos"), Document("", "neg")]
    assert documents("a.csv", table) == [Document("a, b\nc")]
    assert documents("a.csv", f"text\n{'x' * 200_000}\n") == [Document("x" * 200_000)]
    assert documents("a.tsv", "text\tn\na,b\t1\n", "n") == [Document("a,b", "1")]
    assert documents("a.jsonl", '{"text": "a\\nb", "n": 3}\n\n', "n") == [Document("a\nb", "3")]
    assert documents("a.csv", "text,label\na,b,\n", "label") == [Document("a", "b")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "body,label\nx,y\n", "a.csv, line 2, has no 'text', but 'body', 'label': write data.text_column"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', "a.jsonl, line 2, has no 'label', but 'text'"),
        ("a.csv", "text,label\nx,y\nz,\n", "a.csv, line 3, has an empty 'label': fill it in, or leave the row out"),
        (
            "a.csv",
            "text,label\na, b,x\n",
            "a.csv, line 2, has more fields than the first line: put texts that have com",
        ),
        ("a.jsonl", '{"text"\n', "a.jsonl, line 1, is no JSON"),
        ("a.jsonl", '[{"text": "a", "label": 1}]\n', "line 1, is of the type list: write an object into each line"),
        ("a.jsonl", '{"text": {"en": "a"}, "label": 1}\n', "line 1, 'text' is of the type dict: write one text"),
        ("a.jsonl", '{"text": "a", "label": [1, 2]}\n', "line 1, 'label' is of the type list: write one text"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "\\ud800", "label": 1}\n', "a.jsonl, line 2, is no JSON"),
        ("a.jsonl", '{"text": "a", "label": NaN}\n', "a.jsonl, line 1, has an empty 'label': fill it in, or leave"),
        ("a.jsonl", '{"text": NaN, "label": 1}\n', "a.jsonl, line 1, has an empty 'text': fill it in, or leave"),
        ("a.jsonl", '{"text": null, "label": 1}\n', "a.jsonl, line 1, has an empty 'text': fill it in, or leave"),
        ("a.csv", "text,label,label\nx,y,z\n", "a.csv has 1 column name(s) twice, such as 'label': rename one of them"),
        ("a.txt", "x", "a.txt is plain text, which has no labels"),
        ("b.csv", b"text,label\nna\xefve,x\n", "b.csv is not UTF-8 (byte 13)"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_place(name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        documents(name, content, "label")
    assert message in str(error.value)


def test_files_are_found_in_order() -> None:
    Path("texts/deep").mkdir(parents=True)
    for name in ("texts/b.txt", "texts/a.txt", "texts/deep/c.txt"):
        Path(name).write_text("x")
    names = [str(path) for path in find_files("data.files", ["texts/**/*.txt"])]
    assert names == ["texts/a.txt", "texts/b.txt", "texts/deep/c.txt"]
    with pytest.raises(ValueError, match=r"data.val_files \*.md: no such file; write a path"):
        find_files("data.val_files", "*.md")


def test_the_standard_library_is_on_every_machine() -> None:
    files = find_files("data.files", "stdlib")
    names = {path.name for path in files}
    assert {"argparse.py", "typing.py"} <= names
    assert sum(path.stat().st_size for path in files) > 5e6
    assert not any(part in ("site-packages", "test") for path in files for part in path.parts[-3:])
    path = next(path for path in files if path.name == "argparse.py")
    assert next(read(path, "text", None, None)).text == path.read_text()


def splits(texts: list[str], seed: int, fractions: dict[str, float]) -> list[str]:
    keys = [key_of(text, seed) for text in texts]
    borders = split_keys(set(keys), fractions)
    return [next((split for split, border in borders.items() if key < border), "train") for key in keys]


def test_splits_are_those_of_the_texts_alone() -> None:
    texts, fractions = [f"text {number}" for number in range(1000)], {"val": 0.1, "test": 0.2}
    found = splits(texts, 0, fractions)
    assert [found.count(split) for split in ("train", "val", "test")] == [700, 100, 200]
    assert splits(texts[::-1], 0, fractions) == found[::-1]
    assert splits(texts * 2, 0, fractions) == found * 2  # copies stay together
    other = splits(texts, 1, fractions)
    assert sum(a == b == "val" for a, b in zip(found, other, strict=True)) < 30
    # Few documents move when others come.
    more = splits([*texts, *(f"new {number}" for number in range(100))], 0, fractions)[:1000]
    assert sum(a != b for a, b in zip(found, more, strict=True)) < 50


def test_no_split_is_empty() -> None:
    assert sorted(splits(["a", "b", "c"], 0, {"val": 0.01, "test": 0.01})) == ["test", "train", "val"]
    assert splits(["a", "b"], 0, {"val": 0.0, "test": 0.01}).count("test") == 1
    with pytest.raises(
        ValueError, match=r"2 different documents, too few for train, val and test: write data.val_files"
    ):
        splits(["a", "b", "a"], 0, {"val": 0.01, "test": 0.01})
