from pathlib import Path

import pytest
import torch
from helpers import run_here

from batchwise.sources.shard_writing import write_shards
from batchwise.sources.text import Text
from batchwise.sources.token_shards import TokenShards

TEXT = "\n\n".join(f"This is document {number}, and it says {number * 7}." for number in range(300))
SETTINGS = {"sequence_length": 32, "delimiter": "\n\n", "batch_size": 16, "seed": 0}


def made(packing: str | None) -> Text:
    Path("text.txt").write_text(TEXT)
    data = Text("text.txt", packing=packing, **SETTINGS)  # type: ignore[arg-type]
    data.prepare_data()
    return data


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
@pytest.mark.parametrize("document_mask", [False, True])
def test_blocks_are_those_of_the_text(packing: str, document_mask: bool) -> None:
    text = made(packing)
    write_shards(text, Path("shards"), 0.005)
    data = TokenShards("shards", batch_size=16, seed=0, document_mask=document_mask)
    data.setup("fit")
    assert (data.separator, data.sequence_length) == (256, 32)
    text.document_mask, seen = document_mask, []
    for batch in data.train_dataloader():
        (part,) = batch.micro_batches
        shifted = data.transform(part, training=True)
        theirs = text.transform(part, training=True)
        assert torch.equal(shifted.targets, theirs.targets)
        ours = shifted.inputs if document_mask else (shifted.inputs,)
        assert all(map(torch.equal, ours, theirs.inputs if document_mask else (theirs.inputs,)))
        seen += part.inputs.tolist()
    (blocks,) = text.load("train")  # type: ignore[misc]
    assert sorted(seen) == sorted(blocks.tolist())
    assert "document" in data.decode(data.examples("train", 1).inputs[0])


@pytest.mark.weekly
def test_training_writes_text() -> None:
    made("cut")
    files = ("--data.files", "text.txt", "--data.delimiter", "\n\n", "--data.sequence_length", 32)
    assert run_here("shards", "--config", "configs/text.yaml", *files, "--path", "shards", "--mib", 0.01).code == 0
    tokens = ("--data", "batchwise.sources.token_shards.TokenShards", "--data.path", "shards", "--data.batch_size", 16)
    fit = run_here("fit", "--config", "configs/text.yaml", *tokens, "--trainer.max_epochs", 1)
    assert fit.code == 0, fit.err
    small = run_here("fit", "--config", "configs/text.yaml", *tokens, "--model.network.vocab_size", 256)
    assert "write vocab_size 257" in small.err


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"for texts write data\.packing"):
        write_shards(made(None), Path("shards"), 1)
    with pytest.raises(ValueError, match=r"write bytes, or a tokenizer\.json"):
        TokenShards("shards", vocabulary="characters")
