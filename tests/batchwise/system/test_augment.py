"""Augmentation in whole runs: what the network sees does not depend on how the batch is executed, to the bit."""

import re
from pathlib import Path

import pytest
import torch
from helpers import CSV, DIGITS, ROOT, TWO, Result, furthest, run_here, run_process

RECORDED = """
import os
from pathlib import Path
import torch
from batchwise.sources.digits import Digits

class Recorded(Digits):
    def to_device(self, batch, device, training):
        seen = super().to_device(batch, device, training)
        task = self.trainer.lightning_module
        if training and task is not None and task._step.batch:  # not before training
            name = f"seen_{os.getpid()}_{self.trainer.global_step}_{batch.position}"
            fields = [batch.epoch, batch.index, seen.inputs.clone(), seen.targets.clone()]
            if batch.counts:
                torch.save(fields, Path(self.trainer.default_root_dir) / name)
        return seen
"""
AUGMENT = """
data:
  init_args:
    augment:
      - {class_path: batchwise.data.augment.Flip, init_args: {alternate: true}}
      - {class_path: batchwise.data.augment.Flip, init_args: {p: 0.2}}
      - {class_path: batchwise.data.augment.ShiftCrop, init_args: {pixels: 2}}
      - {class_path: batchwise.data.augment.Affine, init_args: {degrees: 10, scale: [0.9, 1.1]}}
      - {class_path: batchwise.data.augment.ColourJitter, init_args: {brightness: 0.2, contrast: 0.2}}
      - {class_path: batchwise.data.augment.CutOut, init_args: {size: 2}}
      - {class_path: batchwise.data.mixing.MixUp, init_args: {num_classes: 10, p: 0.5}}
      - {class_path: batchwise.data.mixing.CutMix, init_args: {num_classes: 10, p: 0.5}}
"""
FIT = ("fit", *DIGITS, *CSV, "--data", "recorded.Recorded", "--config", "augment.yaml", "--data.batch_size", 200)
FIT = (*FIT, "--trainer.precision", "64-true", "--trainer.max_epochs", 2, "--model.schedule.shape", "constant")


@pytest.fixture(autouse=True)
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recorded.py").write_text(RECORDED)
    (tmp_path / "augment.yaml").write_text(AUGMENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def seen(result: Result) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets that the network saw, by epoch and example."""
    found = {}
    for file in result.folder.glob("seen_*"):
        epoch, index, inputs, targets = torch.load(file, weights_only=True)
        for example, *fields in zip(index.tolist(), inputs, targets, strict=True):
            assert (epoch, example) not in found
            found[epoch, example] = fields
    return found


@pytest.mark.slow
def test_processes_micro_batches_and_resume() -> None:
    """1,259 examples in batches of 200, the last of 59, with an odd end; all augmentations at once."""
    whole = run_here(*FIT, "--name", "whole")
    assert whole.code == 0, whole.err
    expected = seen(whole)
    assert len(expected) == 2 * 1259
    assert {inputs.dtype for inputs, _ in expected.values()} == {torch.float64}
    assert sum(not torch.equal(expected[0, example][0], expected[1, example][0]) for example in range(1259)) > 1200
    assert sum(len(targets.nonzero()) > 1 for _, targets in expected.values()) > 1200  # mixed with another class

    two = run_process(*FIT, "--name", "two", *TWO)
    first = run_here(*FIT, "--name", "resumed", "--trainer.max_steps", 9)  # in the second epoch
    assert first.code == 0, first.err
    resumed = run_here(*FIT, "--name", "resumed", "--ckpt_path", "last", "--trainer.accumulate_grad_batches", 3)
    assert resumed.folder == first.folder
    assert "accumulate_grad_batches  3" in resumed.out
    for result in (two, resumed):
        assert result.code == 0, result.err
        ours = seen(result)
        assert ours.keys() == expected.keys()
        pairs = [pair for key in expected for pair in zip(ours[key], expected[key], strict=True)]
        assert all(torch.equal(a, b) for a, b in pairs), result.folder
        assert furthest(whole, result) < 1e-12


@pytest.mark.weekly
def test_yaml_of_the_documents_and_inspect() -> None:
    """The lines of docs/data.md train, and `inspect` shows what they do."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    (lines,) = (block for block in blocks if "augment:" in block)
    Path("readme.yaml").write_text(lines)
    fit = run_here("fit", *DIGITS, *CSV, "--config", "readme.yaml", "--trainer.max_epochs", 3)
    assert fit.code == 0, fit.err
    losses = fit.rows("val/loss")
    assert losses[60] < losses[20]
    looked = run_here("inspect", *DIGITS, *CSV, "--config", "readme.yaml", "--seconds", 1)
    assert looked.code == 0, looked.err
    assert (looked.folder / "inspect.png").stat().st_size > 20000


@pytest.mark.weekly
def test_pairs_and_ghost_batches_of_an_odd_size() -> None:
    """Ghost batches of 5 and pairs: ten examples stay together; and a module of PyTorch draws in between."""
    augment = (
        "[{class_path: batchwise.data.mixing.MixUp, init_args: {num_classes: 10}}, {class_path: torch.nn.Dropout}]"
    )
    norm = ("--model.network.norm", "batch", "--model.ghost_batch_size", 5, "--model.network.dropout", 0)
    sgd = ("--model.optimizer", "{class_path: torch.optim.SGD, init_args: {lr: 0.1}}")
    run = ("fit", *DIGITS, *CSV, *norm, *sgd, "--data.batch_size", 100, "--trainer.precision", "64-true")
    run = (*run, "--trainer.max_epochs", 1, "--data.augment")
    cut, again = (run_here(*run, augment, "--data.micro_batch_size", 20) for _ in range(2))
    assert cut.code == 0, cut.err
    assert "accumulate_grad_batches  5" in cut.out
    assert furthest(cut, again) == 0
    only_pairs = augment.replace(", {class_path: torch.nn.Dropout}", "")
    whole, parts = run_here(*run, only_pairs), run_here(*run, only_pairs, "--data.micro_batch_size", 20)
    assert 0 < furthest(whole, parts) < 1e-12
    assert furthest(whole, cut) > 1e-3
