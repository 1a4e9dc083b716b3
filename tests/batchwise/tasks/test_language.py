"""Language modelling: what is measured, what is predicted, text that is written; and classification of sequences."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CSV, run_here, wandb_records

from batchwise.batching.loader import MicroBatch
from batchwise.models.transformer import Transformer
from batchwise.tasks.language import Language, generate

TINY = "{class_path: batchwise.models.transformer.Transformer, init_args: {width: 16, depth: 1, heads: 2%s}}"
SAYS = "the cat sat on the mat. "


class Next(torch.nn.Module):
    """After token i comes i + 1 of 5, with nine times the weight of the others together."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot((tokens.clamp(min=0) + 1) % 5, 5).double() * math.log(36)


def test_losses_are_of_tokens_and_padding_counts_for_nothing() -> None:
    task = Language(Next())
    inputs, targets = torch.tensor([[4, 0, 1], [2, -1, -1]]), torch.tensor([[0, 1, 3], [3, -1, -1]])
    batch = MicroBatch(inputs, targets, torch.arange(2))
    losses, weights = task.losses(batch)
    right, wrong = math.log(40 / 36), math.log(40)
    assert torch.allclose(losses, torch.tensor([[right, right, wrong], [right, 0, 0]], dtype=torch.float64), atol=1e-12)
    assert weights.tolist() == [[1, 1, 1], [1, 0, 0]]
    predicted = task.predictions(batch)
    assert predicted["loss"].tolist() == pytest.approx([(2 * right + wrong) / 3, right])
    assert predicted["tokens"].tolist() == [3, 1]
    metrics = task.make_metrics(task(inputs))
    metrics.update(task(inputs).transpose(1, 2), targets)
    assert metrics.compute()["accuracy"].item() == 0.75


def test_tokens_are_counted_in_half_precision_too() -> None:
    """bfloat16 has no 301."""
    tokens = torch.zeros(1, 301, dtype=torch.int64)
    network = torch.nn.Embedding(5, 5).bfloat16()
    assert Language(network).predictions(MicroBatch(tokens, tokens, torch.arange(1)))["tokens"].tolist() == [301]


def test_texts_are_drawn_from_what_the_network_gives() -> None:
    class Fixed(torch.nn.Module):
        logits = torch.nn.Parameter(torch.tensor([0.5, 0.2, 0.25, 0.05]).log())

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            assert tokens.shape[1] <= 6
            assert len(seen) > 0 or tokens.tolist() == [[3]]
            seen.append(tokens)
            return self.logits.expand(1, tokens.shape[1], 4)

    seen: list[torch.Tensor] = []
    texts = [generate(Fixed(), torch.tensor([3]), 50, 6, key) for key in range(200)]
    assert torch.equal(texts[7], generate(Fixed(), torch.tensor([3]), 50, 6, 7))
    counts = torch.cat(texts).bincount(minlength=4)
    assert (counts / counts.sum()).tolist() == pytest.approx([0.5, 0.2, 0.25, 0.05], abs=0.02)
    # A text ends with the separator, or is as long as it may be.
    assert all((text == 3).sum() == (text[-1] == 3) for text in texts)
    assert {len(text) for text in texts if text[-1] != 3} == {50}


@pytest.fixture
def corpus() -> None:
    Path("texts.txt").write_text("\n\n".join(SAYS * 2 + f"{number}" for number in range(60)))


@pytest.mark.usefixtures("corpus")
@pytest.mark.slow
def test_it_learns_and_writes_and_predicts() -> None:
    logger = "{class_path: batchwise.run.wandb.WandbLogger, init_args: {offline: true}}"
    run = (
        "--data", "batchwise.sources.text.Text", "--data.files", "texts.txt", "--data.delimiter", "\n\n",
        "--data.packing", "best_fit", "--data.sequence_length", 64, "--data.batch_size", 8, "--data.val_fraction", 0.2,
        "--model", "batchwise.tasks.language.Language", "--model.network", TINY % "", "--model.optimizer",
        "torch.optim.AdamW", "--model.optimizer.lr", 0.02, "--model.sample_length", 30, "--trainer.accelerator", "cpu",
    )  # fmt: skip
    few = ("--trainer.max_epochs", 24, "--trainer.check_val_every_n_epoch", 8)
    fitted = run_here("fit", *run, *few, "--trainer.logger", logger)
    assert fitted.code == 0, fitted.err
    lines = fitted.out.splitlines()
    losses = [float(line.split("average loss ")[1].split()[0]) for line in lines if line.startswith("epoch")]
    assert losses[0] > 4
    assert losses[-1] < 1.2
    assert any(line.startswith("epoch 24 ") and "val/perplexity" in line and "val/accuracy" in line for line in lines)
    written = [lines[number + 1] for number, line in enumerate(lines) if line.endswith("the model writes:")]
    assert len(written) == 3
    assert any(word in written[-1] for word in (" cat ", " the ", " sat ", " mat"))
    (path,) = fitted.folder.glob("wandb/offline-run-*/run-*.wandb")
    keys = {item.nested_key[0] if item.nested_key else item.key for record in wandb_records(path)
            for item in record.history.item}  # fmt: skip
    assert {"val/samples", "val/perplexity", "train/loss"} <= keys
    predicted = run_here("predict", *run, "--ckpt_path", "last")
    assert predicted.code == 0, predicted.err
    header, *rows = (fitted.folder / "predictions.csv").read_text().splitlines()
    assert header == "example,loss,tokens"
    assert all(0 < float(row.split(",")[1]) < 2 and int(row.split(",")[2]) <= 64 for row in rows)


@pytest.mark.slow
def test_sequences_are_classified_by_the_same_task_as_pictures() -> None:
    draw = np.random.default_rng(0)
    with Path("rows.jsonl").open("w") as file:
        for _ in range(150):
            label = draw.integers(3)
            text = "".join(draw.choice(list("abcdef"), draw.integers(1, 30))) + "xyz"[label]
            file.write(json.dumps({"text": text, "label": f"is {'xyz'[label]}"}) + "\n")
    run = (
        "--data", "batchwise.sources.text.Text", "--data.files", "rows.jsonl", "--data.label_column", "label",
        "--data.sequence_length", 32, "--data.batch_size", 16, "--data.val_fraction", 0.2,
        "--model", "batchwise.tasks.classification.Classification", "--model.network", TINY % ", num_classes: 3",
        "--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", 0.03, "--trainer.accelerator", "cpu", *CSV,
    )  # fmt: skip
    fitted = run_here("fit", *run, "--trainer.max_epochs", 8, "--data.order", "batchwise.batching.sampling.Stratified")
    assert fitted.code == 0, fitted.err
    assert max(fitted.rows("val/accuracy").values()) > 0.9
    wrong = run_here("fit", *run, "--model.network.init_args.num_classes", 2)
    assert wrong.code == 2
    assert "write num_classes 3" in wrong.err
    few = run_here("fit", *run, "--model.network.init_args.vocab_size", 100)
    assert few.code == 2
    assert "write vocab_size 257" in few.err


def test_a_network_without_logits_per_token() -> None:
    with pytest.raises(ValueError, match=r"gives the shape \[2, 3\]: logits \[N, T, V\] are needed"):
        Language(Transformer(width=8, heads=2)).check(None, torch.zeros(2, 3))  # type: ignore[arg-type]
