"""Steps that the device checks by itself. A CPU stands in for it: its fused kernels read `found_inf` too."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from capturing import Planted, adamw, make, sgd
from torch import nn

from batchwise.batching.gradients import scale_gradients
from batchwise.errors import TrainingStopped
from batchwise.tasks import step
from batchwise.tasks.ledger import SIZE, Ledger, Made


def trained(optimizer: Any, folder: Path, **settings: Any) -> tuple[Any, Any, str]:
    folder.mkdir()
    usual = {"max_epochs": 12, "log_every_n_steps": 1000, "limit_val_batches": 0}
    task, trainer = small.fit(make(optimizer=optimizer), Planted(), default_root_dir=folder, **usual | settings)
    return task, trainer, (folder / "skipped.csv").read_text()


@pytest.mark.parametrize("rows", [1000, 20])
@pytest.mark.parametrize("optimizer", [adamw, sgd])
@pytest.mark.slow
def test_a_step_that_the_device_skips_is_that_which_the_host_skips(
    optimizer: Any, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """84 steps: two pages are sent, and one is settled at the end of the epoch or with a row."""
    host, first, expected = trained(optimizer, tmp_path / "host", log_every_n_steps=rows)
    monkeypatch.setattr(step, "DEVICES", ("cpu",))
    device, second, skipped = trained(optimizer, tmp_path / "device", log_every_n_steps=rows)
    assert host._step.finite.ledger is None
    assert device._step.finite.ledger is not None
    assert len(expected.splitlines()) == 12
    assert skipped == expected
    assert small.furthest(host, device) < 1e-13
    losses = [one.callback_metrics["train/loss_epoch"].item() for one in (first, second)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-13)


def test_too_many_in_a_row_are_found_pages_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "DEVICES", ("cpu",))
    data = small.Points(batch_size=1)
    data.x[:] = float("inf")
    task = small.Classify(small.network(), optimizer=adamw, max_skipped_steps=3)
    monkeypatch.setattr(task._measures, "rehearsed", True)
    with pytest.raises(TrainingStopped, match="3 steps in a row, up to step 2"):
        small.fit(task, data, log_every_n_steps=1000, default_root_dir=tmp_path)
    assert small.furthest(task.network, small.network()) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
@pytest.mark.parametrize("at", ["loss", "gradient"])
def test_what_is_checked(dtype: torch.dtype, value: float, at: str) -> None:
    ledger, parameter = Ledger(torch.device("cpu")), nn.Parameter(torch.ones(3, dtype=dtype))
    parameter.grad = torch.tensor([1.0, value if at == "gradient" else 2.0, 3.0], dtype=dtype)
    before = parameter.grad.clone()
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    ledger.check(torch.tensor(value if at == "loss" else 0.5, dtype=torch.float64), optimizer, ledger.line)
    assert ledger.line.item() == (value != 1.0)
    assert torch.equal(parameter.grad.nan_to_num(7, 8), before.nan_to_num(7, 8))


@pytest.mark.parametrize("steps", [0, 1, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE, 5 * SIZE + 7])
@pytest.mark.parametrize("on_device", [False, True])
def test_pages(steps: int, on_device: bool) -> None:
    """Each step comes back once, in order, with the sums of those that were made."""
    ledger, seen = Ledger(torch.device("cpu")), []
    skipped = [number % 5 == 3 for number in range(steps)]
    for number in range(steps):
        ledger.line.fill_(float(skipped[number]))
        count = torch.tensor(number + 1.0) if on_device else number + 1.0
        loss = torch.tensor(float("nan") if skipped[number] else 2.0 * number)
        seen += [] if (page := ledger.add(Made(number, 0, count), loss)) is None else [page]
        assert len(ledger) <= 2 * SIZE
    seen += ledger.settle()
    assert len(ledger) == 0
    assert [(made.step, flag) for page in seen for made, flag in page.steps] == list(enumerate(skipped))
    made = [number for number in range(steps) if not skipped[number]]
    assert sum(float(page.loss) for page in seen) == 2.0 * sum(made)
    assert sum(float(page.count) for page in seen) == sum(made) + len(made)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_factor_on_the_device_is_that_of_the_host(dtype: torch.dtype) -> None:
    parameters = [nn.Parameter(torch.ones(2, dtype=dtype)) for _ in range(2)]
    for parameter, factor in zip(parameters, (1 / 3, torch.tensor(1 / 3, dtype=torch.float64)), strict=True):
        parameter.grad = torch.tensor([3.0, 7.0], dtype=dtype)
        scale_gradients([parameter], factor)
    exact = (torch.tensor([3.0, 7.0]) / 3).to(dtype)
    rounding = 0 if dtype == torch.bfloat16 else 1e-6
    for parameter in parameters:
        torch.testing.assert_close(parameter.grad, exact, rtol=rounding, atol=0)


def test_other_optimizers_are_checked_by_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "DEVICES", ("cpu",))
    task, _, skipped = trained(partial(torch.optim.NAdam, lr=0.05), tmp_path / "run")
    assert task._step.finite.ledger is None
    assert len(skipped.splitlines()) == 12
