"""docs/lightning.md: each flag of Lightning's Trainer and each of its callbacks works as documented, or is refused."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import small
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

PAGE = (Path(__file__).parents[2] / "docs" / "lightning.md").read_text()
TABLES = PAGE[PAGE.index("## Flags of the Trainer") : PAGE.index("## A project that you have")]
ROWS = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|$", TABLES, re.MULTILINE))
"""What the page says of each flag and each callback."""
STEPS = 21
"""Of the usual training: 3 epochs of 7 steps."""

WORKS: dict[str, list[tuple[Any, int]]] = {
    # Values of the flag, and the number of optimizer steps. The weights are those of a plain training of so many steps.
    "accelerator": [("cpu", STEPS), ("auto", STEPS)],
    "strategy": [("auto", STEPS)],
    "devices": [(1, STEPS), ("auto", STEPS)],
    "num_nodes": [(1, STEPS)],
    "precision": [("64-true", STEPS), ("64", STEPS)],
    "logger": [(False, STEPS), (True, STEPS)],
    "callbacks": [([], STEPS), (None, STEPS), (theirs.LambdaCallback(), STEPS)],
    "fast_dev_run": [(True, 1), (3, 3), (False, STEPS)],
    "max_epochs": [(1, 7), (3, STEPS), (0, 0)],
    "min_epochs": [(2, STEPS), (0, STEPS)],
    "max_steps": [(5, 5), (-1, STEPS), (0, 0)],
    "min_steps": [(3, STEPS), (0, STEPS)],
    "max_time": [("00:01:00:00", STEPS), ({"hours": 1}, STEPS)],
    "limit_train_batches": [(1.0, STEPS), (7, STEPS)],
    "limit_val_batches": [(0, STEPS), (2, STEPS), (1.0, STEPS)],
    "limit_test_batches": [(2, STEPS)],
    "limit_predict_batches": [(2, STEPS)],
    "val_check_interval": [(2, STEPS), (0.5, STEPS), (1.0, STEPS), ("00:00:00:01", STEPS)],
    "check_val_every_n_epoch": [(2, STEPS)],
    "num_sanity_val_steps": [(2, STEPS), (-1, STEPS)],
    "log_every_n_steps": [(1, STEPS), (1000, STEPS)],
    "enable_checkpointing": [(True, STEPS), (False, STEPS)],
    "enable_progress_bar": [(True, STEPS)],
    "enable_model_summary": [(True, STEPS)],
    "accumulate_grad_batches": [(2, STEPS), (1, STEPS)],
    "gradient_clip_val": [(1e9, STEPS), (0, STEPS)],
    "gradient_clip_algorithm": [("norm", STEPS), ("value", STEPS)],
    "deterministic": [("warn", STEPS)],
    "benchmark": [(True, STEPS)],
    "inference_mode": [(False, STEPS)],
    "profiler": [("simple", STEPS), ("advanced", STEPS)],
    "detect_anomaly": [(True, STEPS)],
    "plugins": [(TorchCheckpointIO(), STEPS)],
    "sync_batchnorm": [(True, STEPS)],
    "reload_dataloaders_every_n_epochs": [(1, STEPS)],
    "default_root_dir": [("elsewhere", STEPS)],
    "enable_autolog_hparams": [(False, STEPS)],
}
REFUSED: dict[str, list[tuple[Any, str]]] = {
    "strategy": [("ddp_spawn", "write ddp in a script, or ddp_notebook in a notebook")],
    "min_steps": [(-1, "trainer.min_steps is -1: write at least 0")],
    "limit_train_batches": [(0, "trainer.limit_train_batches is 0: write at least 1")],
    "overfit_batches": [(1, "leave it out, and write trainer.limit_train_batches, with data.order"), (0.5, "leave it")],
    "val_check_interval": [(0, "write a number of steps, or a share of the epoch"), (0.0, "write a number"), (8, "8")],
    "check_val_every_n_epoch": [(0, "trainer.check_val_every_n_epoch is 0: write at least 1"), (-1, "at least 1")],
    "num_sanity_val_steps": [(-2, "write at least -1")],
    "log_every_n_steps": [(0, "trainer.log_every_n_steps is 0: write at least 1"), (-1, "write at least 1")],
    "gradient_clip_val": [(-1, "trainer.gradient_clip_val is -1: write at least 0")],
    "max_epochs": [(-3, "trainer.max_epochs is -3: write at least -1")],
    "max_steps": [(-5, "trainer.max_steps is -5: write at least -1")],
    "num_nodes": [(0, "trainer.num_nodes is 0: write at least 1")],
    "max_time": [(one, f"trainer.max_time is {one or repr(one)}: write DD:HH:MM:SS") for one in ("", "-1", "1:30")],
    "use_distributed_sampler": [(True, "leave it out, because the data module cuts the batches")],
    "barebones": [(True, "leave it out, and write trainer.logger, enable_checkpointing")],
    "model_registry": [("x", "leave it out, and write trainer.logger.log_model")],
}


@pytest.fixture(scope="module")
def plain() -> Callable[[int], nn.Module]:
    """The weights of a plain training after a number of steps."""
    made: dict[int, nn.Module] = {}

    def trained(steps: int) -> nn.Module:
        if steps not in made:
            made[steps] = small.fit(max_steps=steps)[0] if steps else small.Classify(small.network())
        return made[steps]

    return trained


def test_the_page_has_all_of_them() -> None:
    flags = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    ours = set(theirs.__all__) - {"Callback", "Checkpoint", "ProgressBar", "BaseFinetuning", "BasePredictionWriter"}
    assert set(ROWS) == flags | ours
    assert {name for name in flags if ROWS[name].startswith("refused")} == set(REFUSED) - set(WORKS)
    assert flags == set(WORKS) | set(REFUSED)
    assert ours == set(CALLBACKS) | set(REFUSED_CALLBACKS)
    assert {name for name in ours if ROWS[name].startswith("refused")} == set(REFUSED_CALLBACKS) - set(CALLBACKS)


@pytest.mark.parametrize(("flag", "value", "steps"), [(flag, *one) for flag, each in WORKS.items() for one in each])
def test_flags_that_work(flag: str, value: Any, steps: int, plain: Callable[[int], nn.Module]) -> None:
    data = small.Points(micro_batch_size=5) if flag == "accumulate_grad_batches" and value == 2 else None
    task, trainer = small.fit(data=data, **{flag: value})
    assert trainer.global_step == steps
    assert small.furthest(task, plain(steps)) < 1e-14


@pytest.mark.parametrize(("flag", "value", "words"), [(flag, *one) for flag, each in REFUSED.items() for one in each])
def test_values_that_are_refused(flag: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        small.fit(**{flag: value})
    assert "\n" not in str(error.value).strip()


def test_a_limit_takes_the_first_batches_of_each_epoch() -> None:
    seen: list[int] = []

    class Sees(small.Classify):
        def losses(self, batch: Any) -> Any:
            if self.training and batch.counts:
                seen.extend(batch.index.tolist())
            return super().losses(batch)

    data = small.Points()
    small.fit(Sees(small.network(), optimizer=small.adamw), data, limit_train_batches=3)
    right = [number for epoch in range(3) for number in data.order.indices(epoch, 0, 30).tolist()]
    assert seen[-90:] == right


@pytest.mark.parametrize("flag", ["limit_test_batches", "limit_predict_batches"])
def test_limits_of_test_and_predict(flag: str) -> None:
    trainer = small.trainer(**{flag: 2})
    predictions = trainer.predict(small.Classify(small.network()), datamodule=small.Points(eval_batch_size=10))
    assert predictions is not None
    assert len(predictions) == (2 if flag == "limit_predict_batches" else 7)


class Backbone(small.Classify):
    @property
    def backbone(self) -> nn.Module:
        return self.network[0]  # type: ignore[index]

    def configure_optimizers(self) -> Any:
        return small.adamw(p for p in self.parameters() if p.requires_grad)


CALLBACKS: dict[str, Callable[[], pl.Callback]] = {
    "DeviceStatsMonitor": lambda: theirs.DeviceStatsMonitor(cpu_stats=False),
    "EarlyStopping": lambda: theirs.EarlyStopping("val/loss", patience=99),
    "EMAWeightAveraging": lambda: theirs.EMAWeightAveraging(decay=0.0),
    "LambdaCallback": lambda: theirs.LambdaCallback(on_train_batch_end=lambda *_: None),
    "LearningRateMonitor": lambda: theirs.LearningRateMonitor("step"),
    "ModelCheckpoint": lambda: theirs.ModelCheckpoint(monitor="val/loss", save_last=True, every_n_train_steps=4),
    "ModelPruning": lambda: theirs.ModelPruning("l1_unstructured", amount=0.0),
    "ModelSummary": lambda: theirs.ModelSummary(),
    "OnExceptionCheckpoint": lambda: theirs.OnExceptionCheckpoint("kept"),
    "RichModelSummary": lambda: theirs.RichModelSummary(),
    "RichProgressBar": lambda: theirs.RichProgressBar(),
    "SpikeDetection": lambda: theirs.SpikeDetection(warmup=99),
    "StochasticWeightAveraging": lambda: theirs.StochasticWeightAveraging(0.05),
    "ThroughputMonitor": lambda: theirs.ThroughputMonitor(len, window_size=5),
    "Timer": lambda: theirs.Timer("00:01:00:00"),
    "TQDMProgressBar": lambda: theirs.TQDMProgressBar(),
    "WeightAveraging": lambda: theirs.WeightAveraging(),
    "BackboneFinetuning": lambda: theirs.BackboneFinetuning(1),
}
REFUSED_CALLBACKS: dict[str, tuple[Callable[[], pl.Callback], str]] = {
    "BackboneFinetuning": (lambda: theirs.BackboneFinetuning(), r"needs Classify.backbone: write a property"),
    "BatchSizeFinder": (lambda: theirs.BatchSizeFinder(), "the command tune finds a batch size"),
    "GradientAccumulationScheduler": (lambda: theirs.GradientAccumulationScheduler({0: 2}), "write data.batch_size_s"),
    "LearningRateFinder": (lambda: theirs.LearningRateFinder(), "the command tune finds a learning rate"),
}
CHANGE = {"StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging", "BackboneFinetuning"}
"""Those that are meant to give other weights."""


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.slow
def test_callbacks_that_work(name: str, plain: Callable[[int], nn.Module]) -> None:
    task = Backbone(small.network(), optimizer=small.adamw) if name == "BackboneFinetuning" else None
    callback = CALLBACKS[name]()
    with_bar = {"enable_progress_bar": True} if "ProgressBar" in name else {}
    saving = {"enable_checkpointing": True} if "Checkpoint" in name else {}
    task, trainer = small.fit(
        task, callbacks=[callback], logger=CSVLogger("log"), log_every_n_steps=5, **with_bar, **saving
    )
    assert trainer.global_step == STEPS
    assert any(one is callback for one in trainer.callbacks)
    if name not in CHANGE:
        assert small.furthest(task, plain(STEPS)) < 1e-14


@pytest.mark.parametrize("name", REFUSED_CALLBACKS)
def test_callbacks_that_are_refused(name: str) -> None:
    make, words = REFUSED_CALLBACKS[name]
    with pytest.raises(ValueError, match=words):
        small.fit(callbacks=[make()])
