"""On Apple's `mps`, which has no float64: nothing of ours makes one there, and the results are those of the host.

On a stand-in, for machines without the device.
"""

import helpers
import lightning.pytorch as pl
import numpy as np
import pytest
import small
import standin
import torch
from examples import Log, furthest, train
from helpers import BF16, DIGITS, run_here

from batchwise.batching.ragged import Ragged
from batchwise.callbacks.ema import EMA
from batchwise.choosing import short, speed

AUTO = {"accelerator": "auto", "devices": 1}
SHORT = (*DIGITS, "--trainer.max_steps", 3, "--trainer.log_every_n_steps", 1, "--trainer.limit_val_batches", 1)
FIT = ("fit", *SHORT, "--trainer.accelerator", "auto")


def there(function, *arguments, **settings):
    """Call a function with the stand-in; return what it returns, and what had to wait for the device meanwhile."""
    with standin.mps():
        return function(*arguments, **settings), list(standin.WAITS)


@pytest.mark.parametrize("name", standin.EXAMPLES)
@pytest.mark.slow
def test_every_example_trains_as_on_the_host(name):
    settings = {"micro": 7, "precision": "32-true", "limit_train_batches": 2}
    host = train(name, **settings)
    found, waits = there(train, name, **settings, **AUTO)
    assert waits
    found["weights"] = {key: value.cpu() for key, value in found["weights"].items()}
    weights, logged = furthest(host, found)
    assert weights < 1e-6
    assert logged < 1e-5
    assert found["log"].keys() == host["log"].keys()


@pytest.mark.parametrize("precision", [(), BF16], ids=["", "bf16-mixed"])
@pytest.mark.slow
def test_the_command_line_takes_the_device(precision):
    result, waits = there(run_here, *FIT, *precision)
    assert result.code == 0, result.err
    assert waits
    host = run_here("fit", *SHORT, *precision)
    assert result.rows("train/loss") == pytest.approx(host.rows("train/loss"), abs=1e-5 if not precision else 1e-2)
    assert all(value.device.type == "cpu" for value in result.checkpoint()["state_dict"].values())


@pytest.mark.weekly
def test_a_checkpoint_of_the_host_goes_on_and_is_evaluated_there():
    last = run_here("fit", *SHORT).folder / "checkpoints" / "last.ckpt"
    auto = ("--trainer.accelerator", "auto")
    more = ("fit", *SHORT, "--trainer.max_steps", 6, "--ckpt_path", last)
    figures = ("validate", *DIGITS, "--ckpt_path", last)
    host, far = run_here(*more), there(run_here, *more, *auto)[0]
    assert far.code == 0, far.err
    assert helpers.furthest(host, far) < 1e-6
    assert there(run_here, *figures, *auto)[0].out == run_here(*figures).out


@pytest.mark.parametrize("asked", [("--speed", "auto"), ("--data.micro_batch_size", "auto")])
@pytest.mark.slow
def test_speed_is_measured_on_the_device(asked, monkeypatch):
    monkeypatch.setattr(speed, "_TURN", 0.01)  # seconds
    devices, run = set(), speed.Stopwatch._run

    def noted(self, *arguments):
        devices.add((self.device.type, next(self.tasks[False].parameters()).device.type))
        run(self, *arguments)

    monkeypatch.setattr(speed.Stopwatch, "_run", noted)
    result, waits = there(run_here, *FIT, *asked)
    assert result.code == 0, result.err
    assert devices == {("mps", "mps")}
    assert "synchronize" in waits  # else it would take the time of the host


def test_short_trainings_are_on_the_device():
    """Those of `tune` and `sweep`."""
    devices = []

    class Seen(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            devices.append(next(pl_module.parameters()).device.type)

    def train():
        task, data = small.Classify(small.network().float(), optimizer=small.adamw), small.Points()
        short.train(small.trainer(precision="32-true", **AUTO), task, data, 2, [Seen()])

    there(train)
    assert devices == ["mps", "mps"]


def test_float64_is_refused_in_one_line():
    result, _ = there(run_here, *FIT, "--trainer.precision", "64-true")
    assert result.code == 2
    assert result.err.splitlines()[-1] == (
        "error: network.layers.1.weight is float64, which accelerator mps does not have: write trainer.accelerator "
        "cpu, or trainer.precision 32-true and weights in float32"
    )
    assert "Traceback" not in result.err


def test_weights_in_float64_are_refused():
    with pytest.raises(ValueError, match=r"^network\.0\.weight is float64, which accelerator mps does not have"):
        there(small.fit, precision="32-true", **AUTO)


class Logs(small.Classify):
    def losses(self, batch):
        losses = super().losses(batch)
        if self.training:
            self.log("vector", losses)
            self.log("float", 0.1)
            self.log("int", 3)
        return losses


def test_all_kinds_of_values_are_logged():
    task, log = Logs(small.network().float(), optimizer=small.adamw), Log()
    settings = {"precision": "32-true", "logger": log, "log_every_n_steps": 1, "max_epochs": 1}
    there(small.fit, task, small.Points(micro_batch_size=3), **settings, **AUTO)
    for step in range(1, 8):
        assert log.values[f"{step} vector"] == pytest.approx(log.values[f"{step} train/loss"], rel=1e-6)
        assert log.values[f"{step} float"] == 0.1
        assert log.values[f"{step} int"] == 3


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.slow
def test_a_step_waits_once_for_the_device(micro):
    """To learn whether its loss and its gradient are finite."""

    def waits(steps):
        task = small.Classify(small.network().float(), optimizer=small.adamw)
        data = small.Points(micro_batch_size=micro)
        return len(there(small.fit, task, data, precision="32-true", max_steps=steps, **AUTO)[1])

    assert waits(6) - waits(2) == 4


def test_the_network_has_the_average_after_training():
    """It is on the host by then, and the tensors that were averaged are not."""
    host, far = (small.Classify(small.network().float(), optimizer=small.adamw) for _ in range(2))
    settings = {"callbacks": [EMA(20)], "precision": "32-true"}
    small.fit(host, **settings)
    there(small.fit, far, **settings, **AUTO)
    assert small.furthest(far, host) < 1e-5


class Loaded(small.Points):
    """The user has put the examples on the device already."""

    def load(self, split):
        return self.x.float().to("mps"), self.y.to("mps")


class Sequences(Loaded):
    def load(self, split):
        x, y = super().load(split)
        return Ragged(x.flatten(), torch.arange(0, 325, 5, device="mps"), y)


@pytest.mark.parametrize("kind", [Loaded, Sequences])
def test_examples_that_are_loaded_on_the_device(kind):
    host, far = (small.Classify(small.network().float(), optimizer=small.adamw) for _ in range(2))
    small.fit(host, precision="32-true")
    there(small.fit, far, kind(), precision="32-true", **AUTO)
    assert small.furthest(far, host) < 1e-5


REFUSED = {
    "float64": lambda far: far.double(),
    "float64, made there": lambda far: torch.zeros(2, device="mps", dtype=torch.float64),
    "float64, carried there": lambda far: torch.zeros(2, dtype=torch.float64).to("mps"),
    "two devices": lambda far: far + torch.ones(2),
    "NumPy": np.asarray,
}


@pytest.mark.parametrize("way", REFUSED)
def test_the_stand_in_refuses_what_the_device_refuses(way):
    """So that the tests above can fail."""
    with standin.mps(), pytest.raises((TypeError, RuntimeError), match=r"mps|MPS"):
        REFUSED[way](torch.ones(2).to("mps"))


def test_the_stand_in_computes_and_waits():
    with standin.mps():
        far = torch.tensor([1.0, 2.0], device="mps", requires_grad=True)
        (far.exp() * 2).sum().backward()
        assert far.grad.device == torch.device("mps", 0)
        assert standin.WAITS == []
        assert torch.equal(far.grad.cpu(), 2 * torch.tensor([1.0, 2.0]).exp())
        assert standin.WAITS == ["_to_copy"]
        assert far[1].item() == 2
        assert standin.WAITS == ["_to_copy", "_local_scalar_dense"]
