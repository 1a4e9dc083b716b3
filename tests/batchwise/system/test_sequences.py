"""Sequences of unequal length: the result does not depend on how a batch of them is executed."""

import re
import sys
from pathlib import Path

import pytest
from helpers import CSV, DIGITS, TWO, Result, furthest, run_here, run_process

OWN = """
import torch
import torch.nn.functional as F
from torch import nn
from batchwise.batching.ragged import Ragged
from batchwise.data.module import DataModule
from batchwise.models.dropout import Dropout
from batchwise.tasks.task import Task

class Words(DataModule):
    def load(self, split):
        generator = torch.Generator().manual_seed(int(split == "train"))
        # Log-uniform from 1 to 512.
        lengths = (513 ** torch.rand(90, generator=generator, dtype=torch.float64)).long()
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        return Ragged(torch.randint(0, 32, (int(offsets[-1]),), generator=generator), offsets)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.dropout, self.last = nn.Embedding(33, 8), Dropout(0.2), nn.Linear(8, 32)

    def forward(self, tokens):
        before = torch.arange(1, tokens.shape[1] + 1)[:, None]
        return self.last(self.dropout(self.embedding(tokens + 1).cumsum(1) / before))

class Next(Task):
    \"\"\"Nothing counts of every fifth example; nor of those of one token, which has no next.\"\"\"

    def losses(self, batch):
        targets = F.pad(batch.inputs[:, 1:], (0, 1), value=-1).long()
        weights = (targets >= 0) & (batch.index % 5 > 0)[:, None]
        logits = self(batch.inputs).transpose(1, 2)
        return F.cross_entropy(logits, targets.clamp(min=0), reduction="none"), weights
"""
FIT = (
    *("fit", *CSV, "--data", "own_words.Words", "--model", "own_words.Next", "--model.network", "own_words.Net"),
    *("--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", 0.01, "--data.batch_tokens", 2400),
    *("--trainer.precision", "64-true", "--trainer.max_epochs", 2, "--trainer.accelerator", "cpu"),
)


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_words.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_words", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def fit(*arguments: object) -> Result:
    run = run_process if "ddp" in arguments else run_here
    result = run(*FIT, *arguments)
    assert result.code == 0, result.err
    return result


@pytest.mark.slow
def test_every_execution_gives_the_same_weights_and_losses() -> None:
    whole = fit("--name", "whole")
    figures = dict(re.findall(r"^ +(\w+)  ([\d,]+)$", whole.out, re.MULTILINE))
    assert figures["batch_tokens"] == "2,400"
    steps = int(figures["steps_per_epoch"])
    assert steps == -(-int(figures["tokens"].replace(",", "")) // 2400) > 2
    assert list(whole.rows("train/loss")) == list(range(1, 2 * steps + 1))
    cut = fit("--data.micro_batch_tokens", 513, "--name", "cut")
    two = fit(*TWO, "--name", "two")
    fit("--trainer.max_steps", steps + 2, "--name", "resumed")
    resumed = fit(*TWO, "--data.micro_batch_tokens", 513, "--name", "resumed", "--ckpt_path", "last")
    assert f"resuming after step {steps + 2}" in resumed.out
    for result in (cut, two, resumed):
        print(result.folder.parent.name, furthest(whole, result))
        assert furthest(whole, result) < 1e-12
        for column in ("train/loss", "train/loss_epoch", "gradient_norm", "val/loss"):
            ours, theirs = result.rows(column), whole.rows(column)
            assert ours.keys() >= theirs.keys()  # an interrupted epoch has a row too
            assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-12, column


@pytest.mark.slow
def test_a_micro_batch_in_which_no_token_counts_changes_nothing() -> None:
    """Batches in examples; 90 of them in as many micro-batches, some of a single token or of an example left out."""
    whole = fit("--data.batch_tokens", "null", "--data.batch_size", 90, "--name", "whole")
    single = fit(
        *("--data.batch_tokens", "null", "--data.batch_size", 90, "--data.micro_batch_size", 1, "--name", "single")
    )
    print(furthest(whole, single))
    assert furthest(whole, single) < 1e-12


@pytest.mark.slow
def test_what_cannot_be_is_said_before_training() -> None:
    for arguments, message in (
        (("--data.batch_tokens", 100), r"data.batch_tokens is 100, but example \d+ has \d+ tokens: write at least"),
        (("--data.batch_size", 8), "data.batch_size is 8 and data.batch_tokens 2400: write one of them"),
        (("--trainer.accumulate_grad_batches", 5), "accumulate_grad_batches is 5, .* write data.micro_batch_tokens"),
    ):
        refused = run_here(*FIT, *arguments)
        assert refused.code == 2
        assert re.search(message, refused.err), refused.err
    refused = run_here("fit", *DIGITS, "--data.micro_batch_tokens", 100)
    assert refused.code == 2
    assert "the training split has no lengths: write data.batch_size" in refused.err
