"""Text to tokens and back: bytes, characters, or a file of the `tokenizers` library."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from batchwise.errors import optional

UNKNOWN = "\ufffd"
"""What a token stands for that the vocabulary does not know. A network may know more tokens, and give them."""


class Bytes:
    """The 256 bytes of UTF-8: any text, no unknown token."""

    size = 256

    def encode(self, text: str) -> np.ndarray:
        """Return the bytes."""
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, tokens: list[int]) -> str:
        """Return the text."""
        return b"".join(bytes([token]) if token < self.size else UNKNOWN.encode() for token in tokens).decode(
            errors="replace"
        )


class Characters:
    """The characters of some text, in rising order, and then one token for all other characters.

    Args:
        characters: each once.
    """

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(characters))
        self._known = _codes(self.characters)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.characters) + 1

    def encode(self, text: str) -> np.ndarray:
        """Return the places of the characters in the order."""
        codes = _codes(text)
        places = np.searchsorted(self._known, codes).clip(max=len(self._known) - 1)
        return np.where(self._known[places] == codes, places, len(self._known))

    def decode(self, tokens: list[int]) -> str:
        """Return the characters."""
        return "".join(self.characters[token] if token < len(self.characters) else UNKNOWN for token in tokens)


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


class Tokenizer:
    """A trained tokenizer, from a file of the `tokenizers` library (`tokenizer.json`).

    Args:
        path: path of the file.

    Raises:
        ValueError: there is no such file, it cannot be read, or the library is not installed.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        if not Path(path).is_file():
            raise ValueError(f"data.vocabulary {path} is no file: write bytes, characters, or a tokenizer.json")

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizers = optional("tokenizers", "text")
        try:
            return tokenizers.Tokenizer.from_file(self.path)
        except Exception as error:  # the library has no other class for it
            raise ValueError(f"data.vocabulary {self.path} is no file of tokenizers: {error}") from error

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens, without marks for beginning and end."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens."""
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


Vocabulary = Bytes | Characters | Tokenizer
"""Tokens are 0 to size - 1."""


def make_vocabulary(name: str, characters: str = "") -> Vocabulary:
    """Return the vocabulary of bytes, of the given characters, or of a file."""
    return Bytes() if name == "bytes" else Characters(characters) if name == "characters" else Tokenizer(name)
