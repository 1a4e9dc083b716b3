"""The rows of a training that was stopped at any step and gone on with are those of one that was not."""

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import small
from lightning.pytorch.callbacks import Callback

from batchwise.callbacks.checkpoint import Last
from batchwise.callbacks.noise_scale import NoiseScale
from batchwise.errors import TrainingStopped

STEPS = range(94, 103)


class Stop(Callback):
    """Sends a signal to this process after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def rows(callbacks: list[Callback], *loggers: small.Memory, ckpt_path: str | None = None) -> None:
    task = small.Classify(small.network(), optimizer=small.adamw)
    small.fit(
        task, small.Points(batch_size=2, micro_batch_size=1), ckpt_path=ckpt_path,
        callbacks=[NoiseScale(2), *callbacks], enable_checkpointing=True, log_every_n_steps=3, logger=list(loggers),
        max_epochs=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int | None, float]]:
    before, folder = os.getcwd(), tmp_path_factory.mktemp("whole")
    os.chdir(folder)
    logger = small.Memory()
    rows([Last()], logger)
    os.chdir(before)
    names = {name for _, row in logger.rows for name in row if "second" not in name and "memory" not in name}
    return {name: logger.found(name) for name in names - {"data_wait"}}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.weekly
def test_stopped_after_any_step(step: int, expected: dict[str, dict[int | None, float]]) -> None:
    assert {"noise_scale_low", "train/loss", "train/accuracy", "val/loss", "gradient_norm"} <= expected.keys()
    assert len(expected["noise_scale_low"]) > 3
    logger = small.Memory()
    with pytest.raises(TrainingStopped):
        rows([Last(), Stop(step)], logger)
    rows([Last()], logger, ckpt_path=str(Path("checkpoints/last.ckpt").absolute()))
    for name, values in expected.items():
        found = logger.found(name)
        assert found.keys() == values.keys(), name
        for number, value in values.items():
            assert found[number] == pytest.approx(value, rel=1e-9), (name, number)
    steps = [number for number, row in logger.rows if "train/loss" in row]
    assert len(steps) == len(set(steps))


@pytest.mark.parametrize(("every", "steps", "remedy"), [(10, 390, "write every_n_steps 9"), (1, 39, "train longer")])
def test_a_training_that_is_too_short_is_named(every: int, steps: int, remedy: str) -> None:
    def train(steps: int) -> dict[int | None, float]:
        task, data, memory = (
            small.Classify(small.network()),
            small.Points(batch_size=16, micro_batch_size=8),
            small.Memory(),
        )
        ends: dict[str, Any] = {"max_steps": steps, "max_epochs": -1, "log_every_n_steps": 1}
        small.fit(task, data, callbacks=[NoiseScale(every)], logger=memory, limit_val_batches=0, **ends)
        return memory.found("noise_scale_low")

    line = f"needs 40 samples, one in {every} steps, which this training of {steps} steps does not have.*{remedy}$"
    with pytest.warns(match=line):
        assert not train(steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the gradient noise scale needs")
        assert train(steps + 1)
