"""Tokens as a language model takes them: shifted by one place, with a separator between documents."""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from batchwise.batching.loader import MicroBatch
from batchwise.batching.ragged import PADDING

END = "<|end|>"
"""The separator as text."""


def next_tokens(batch: MicroBatch, separator: int, document_mask: bool) -> MicroBatch:
    """Return a micro-batch of tokens [N, T] with inputs and targets [N, T] of a language model.

    Args:
        batch: its inputs are tokens, with -1 past the end. They become the targets.
        separator: the token that stands in front of the inputs.
        document_mask: the inputs become `(tokens, documents)`, where documents are counted.
    """
    targets = batch.inputs.long()
    inputs = F.pad(targets[:, :-1], (1, 0), value=separator).where(targets >= 0, PADDING)
    documents = (inputs == separator).cumsum(1)
    return replace(batch, inputs=(inputs, documents) if document_mask else inputs, targets=targets)


class Tokenized:
    """What data modules of tokens have in common: the separator, the way back to text, and a check of the network."""

    vocabulary: Any
    """The `Vocabulary`: text to tokens and back."""

    @property
    def separator(self) -> int:
        """The token between documents."""
        return self.vocabulary.size

    def decode(self, tokens: Tensor) -> str:
        """Return the text of tokens [T], with `<|end|>` for the separator and nothing for padding."""
        parts: list[list[int]] = [[]]
        separator = self.separator
        for token in tokens.tolist():
            if token == separator:
                parts.append([])
            elif token >= 0:
                parts[-1].append(token)
        return END.join(self.vocabulary.decode(part) for part in parts)

    def check(self, network: nn.Module) -> None:
        """Check that the network knows all tokens.

        Raises:
            ValueError: it knows fewer.
        """
        tokens = self.separator + 1
        known = getattr(network, "vocab_size", tokens)
        if known < tokens:
            raise ValueError(
                f"model.network knows {known} tokens, but the data has {tokens}, with the separator: "
                f"write vocab_size {tokens}"
            )
