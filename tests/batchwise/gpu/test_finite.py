"""Steps whose loss is not finite are skipped on a GPU as they are on the CPU."""

from functools import partial
from pathlib import Path
from typing import Any

import parts
import pytest
import small
import torch

from batchwise.errors import TrainingStopped

pytestmark = pytest.mark.gpu

OPTIMIZERS: dict[str, Any] = {
    "AdamW": small.adamw,
    "AdamW, amsgrad": partial(torch.optim.AdamW, lr=0.05, amsgrad=True),
    "SGD": parts.sgd,
    "SGD without momentum": partial(torch.optim.SGD, lr=0.1),
    "not fused": partial(torch.optim.AdamW, lr=0.05, foreach=True),
    "another": partial(torch.optim.NAdam, lr=0.05),
}


def skipping(name: str, folder: Path, **settings: Any) -> tuple[small.Task, str]:
    """Train with one infinite example, which spoils one step in each of 3 epochs; return skipped.csv too."""
    folder.mkdir()
    task = small.Classify(small.network(), optimizer=OPTIMIZERS[name])
    data = parts.Points(infinite=[parts.PLANTED])
    small.fit(task, data, limit_val_batches=0, default_root_dir=folder, **settings)
    return task, (folder / "skipped.csv").read_text()


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_planted_infinity_is_skipped(
    name: str, rows: int, on: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"log_every_n_steps": rows, "gradient_clip_val": 1.0}
    theirs, expected = skipping(name, tmp_path / "cpu", **settings)
    capsys.readouterr()
    ours, skipped = skipping(name, tmp_path / "device", **settings, **on)
    assert skipped == expected
    wrong = [line.split(",") for line in skipped.splitlines()]
    assert [int(step) // 7 for step, *_ in wrong] == [0, 1, 2]
    assert all(str(parts.PLANTED) in examples for _, *examples in wrong)
    out = capsys.readouterr().out
    for step, *examples in wrong:
        assert f"step {step}: loss or gradient is not finite; skipped; its examples: {', '.join(examples[:8])}" in out
    assert parts.moved(ours, small.network()) > 0.1
    assert small.furthest(ours, theirs) < 1e-10


def test_the_epochs_loss_leaves_skipped_steps_out(on: dict[str, Any]) -> None:
    def mean(**settings: Any) -> float:
        data = parts.Points(infinite=[parts.PLANTED])
        _, trainer = small.fit(data=data, limit_val_batches=0, log_every_n_steps=1000, **settings)
        return trainer.callback_metrics["train/loss_epoch"].item()

    expected = mean()
    assert 0 < expected < 2
    assert mean(**on) == pytest.approx(expected, rel=1e-9)


def test_running_statistics_leave_skipped_steps_out(on: dict[str, Any]) -> None:
    def trained(**settings: Any) -> small.Task:
        network = parts.mlp(torch.nn.BatchNorm1d(8))
        task = small.Classify(network, optimizer=small.adamw, ghost_batch_size=5)
        data = parts.Points(infinite=[parts.PLANTED])
        return small.fit(task, data, limit_val_batches=0, log_every_n_steps=1000, **settings)[0]

    ours, theirs = trained(**on), trained()
    assert all(value.isfinite().all() for value in ours.state_dict().values())
    assert small.furthest(ours, theirs) < 1e-10


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_too_many_in_a_row_stop_training(name: str, on: dict[str, Any], tmp_path: Path) -> None:
    """Only two steps may be skipped; all of them are wrong, so the weights stay, without decay."""
    task = small.Classify(small.network(), optimizer=OPTIMIZERS[name], max_skipped_steps=2)
    data = parts.Points(infinite=range(32, 64))
    with pytest.raises(TrainingStopped, match=r"not finite in \d+ steps in a row, up to step \d+"):
        small.fit(task, data, limit_val_batches=0, log_every_n_steps=5, default_root_dir=tmp_path, **on)
    lines = (tmp_path / "skipped.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in lines[:2]] == [0, 1]
    assert small.furthest(task.network.cpu(), small.network()) == 0
