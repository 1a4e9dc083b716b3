from pathlib import Path

import numpy as np
import pytest

from batchwise.sources.vocabulary import Bytes, Characters, make_vocabulary

TEXT = "naïve 漢字\n🙂"


def test_bytes_take_any_text() -> None:
    tokens = Bytes().encode(TEXT)
    assert tokens.tolist() == list(TEXT.encode())
    assert Bytes().decode(tokens.tolist()) == TEXT
    assert Bytes().decode([0xFF]) == "\ufffd"


def test_characters_are_in_rising_order_and_others_are_one_token() -> None:
    vocabulary = Characters("nabc🙂")
    assert vocabulary.characters == "abcn🙂"
    assert vocabulary.size == 6
    assert vocabulary.encode("a🙂zn").tolist() == [0, 4, 5, 3]
    assert vocabulary.decode([0, 4, 5, 3]) == "a🙂\ufffdn"
    assert make_vocabulary("characters", "nab").encode("nab").tolist() == [2, 0, 1]


def test_a_file_of_tokenizers() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "def": 1, "return": 2, "x": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save("words.json")
    vocabulary = make_vocabulary("words.json")
    assert vocabulary.size == 4
    assert vocabulary.encode("def x return y").tolist() == [1, 3, 2, 0]
    assert vocabulary.encode("").dtype == np.int64
    assert vocabulary.decode([1, 3]) == "def x"


def test_what_is_no_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"data.vocabulary byte is no file: write bytes, characters, or a tokenizer"):
        make_vocabulary("byte")
    pytest.importorskip("tokenizers")
    Path("broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"data.vocabulary broken.json is no file of tokenizers"):
        _ = make_vocabulary("broken.json").size
