"""Tokens as a language model takes them: shifted by one place, with a separator between documents."""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from batchwise.batching.loader import MicroBatch
from batchwise.batching.ragged import PADDING
from batchwise.sources.vocabulary import Vocabulary

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


def text_of(tokens: Tensor, separator: int, vocabulary: Vocabulary) -> str:
    """Return the text of tokens [T], with `<|end|>` for the separator and nothing for padding."""
    parts: list[list[int]] = [[]]
    for token in tokens.tolist():
        if token == separator:
            parts.append([])
        elif token >= 0:
            parts[-1].append(token)
    return END.join(vocabulary.decode(part) for part in parts)


def check_tokens(network: nn.Module, tokens: int) -> None:
    """Check that a network knows so many tokens.

    Raises:
        ValueError: it knows fewer.
    """
    known = getattr(network, "vocab_size", tokens)
    if known < tokens:
        raise ValueError(
            f"model.network knows {known} tokens, but the data has {tokens}, with the separator: "
            f"write vocab_size {tokens}"
        )
