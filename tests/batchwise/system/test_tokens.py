"""Tokens are counted exactly: sequences of unequal length, however they are cut and padded, real processes, float64."""

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import CSV, TWO, Result, furthest, run_here, run_process

TINY = (
    "{class_path: batchwise.models.transformer.Transformer, init_args: {width: 16, depth: 2, heads: 2, dropout: 0.1}}"
)
HOLES = """
from batchwise.batching.ragged import Ragged
from batchwise.sources.text import Text

class Holes(Text):
    def load(self, split):
        whole = super().load(split)
        return Ragged(whole.values, sorted([*whole.offsets.tolist(), *whole.offsets[:12].tolist()]), empty="keep")
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 texts with lengths log-uniform from 1 to 512; and a data module that puts 12 empty sequences between them."""
    home, draw = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    lengths = np.exp(draw.uniform(0, math.log(512), 45)).astype(int)
    rows = [{"text": "".join(draw.choice(list("abcd e"), length))} for length in lengths]
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (home / "holes_data.py").write_text(HOLES)
    return home


def fit(home: Path, *arguments: object) -> Result:
    command = (
        "fit", *CSV, "--data", "holes_data.Holes", "--data.files", home / "rows.jsonl", "--data.sequence_length", 512,
        "--data.batch_size", 20, "--model", "batchwise.tasks.language.Language", "--model.network", TINY,
        "--model.sample_length", 0, "--trainer.max_epochs", 2, "--trainer.accelerator", "cpu",
        "--trainer.precision", "64-true", *arguments,
    )  # fmt: skip
    several = run_process(*command, OMP_NUM_THREADS="1", PYTHONPATH=str(home)) if "ddp" in command else None
    result = several or run_here(*command)
    assert result.code == 0, result.err
    return result


@pytest.mark.slow
def test_every_execution_gives_the_same_weights_and_figures(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(home))
    sys.modules.pop("holes_data", None)
    importlib.invalidate_caches()
    whole = fit(home)
    assert len(whole.rows("train/loss")) == 6
    for execution in (
        ("--data.micro_batch_size", 1),  # of which some hold no token that counts
        ("--trainer.accumulate_grad_batches", 5),
        (*TWO, "--trainer.accumulate_grad_batches", 3),
    ):
        result = fit(home, *execution)
        assert furthest(whole, result) < 1e-12
        for column in ("train/loss", "train/loss_epoch", "gradient_norm", "val/loss", "val/perplexity"):
            ours, theirs = result.rows(column), whole.rows(column)
            assert ours.keys() == theirs.keys()
            assert max(abs(ours[step] / theirs[step] - 1) for step in theirs) < 1e-12, column
        assert result.rows("val/accuracy") == whole.rows("val/accuracy")
    for step, loss in whole.rows("val/loss").items():
        assert whole.rows("val/perplexity")[step] == pytest.approx(math.exp(loss), rel=1e-12)
