"""Blocks of tokens in shards, for language models."""

from functools import cached_property
from os.path import expanduser
from typing import Any

from batchwise.arguments import typed
from batchwise.sources.language import Tokenized
from batchwise.sources.shards import Shards
from batchwise.sources.vocabulary import Vocabulary, make_vocabulary


class TokenShards(Tokenized, Shards):
    """Blocks of tokens [N, T] in shards, as the command `shards` writes those of `Text` with `packing`.

    Past the end of the last document stands -1, and between documents the separator, which is the token after those of
    the vocabulary. The targets are a block, and the inputs the same, shifted by one place.

    Args:
        path: as of `Shards`.
        inputs: the column of the tokens.
        vocabulary: bytes, or the path of a `tokenizer.json`.
        document_mask: keep documents in a block apart: the network gets `(tokens, documents)`.
        **kwargs: those of `Shards`.
    """

    @typed
    def __init__(
        self, path: str, inputs: str = "inputs", vocabulary: str = "bytes", document_mask: bool = False, **kwargs
    ) -> None:
        super().__init__(path, inputs, target=None, **kwargs)
        if vocabulary == "characters":
            raise ValueError("data.vocabulary is characters, which only texts have: write bytes, or a tokenizer.json")
        self.vocabulary_name, self.document_mask = expanduser(vocabulary), document_mask

    def learn(self) -> dict[str, Any]:
        """A hash of the training shards, and the size of the vocabulary."""
        return super().learn() | {"tokens": self.vocabulary.size}

    @cached_property
    def sequence_length(self) -> int:
        """Tokens of a block."""
        split = next(split for split in ("train", "val", "test") if self.index.of(split))
        return self.examples(split, 1).inputs.shape[1]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Text to tokens and back."""
        return make_vocabulary(self.vocabulary_name, "")
