"""What the code relies on in Lightning and jsonargparse, faults included: an upgrade that changes it is seen here."""

import inspect
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import wandb
from jsonargparse import ArgumentParser, _typehints
from lightning.fabric.utilities import cloud_io
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loops import fetchers, training_epoch_loop
from lightning.pytorch.loops.optimization import automatic
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector import logger_connector, result
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


class Plain(pl.LightningModule):
    """Lightning as documented: the mean loss of a batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1).double()
        self.steps: list[Any] = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def inputs(examples: int = 10) -> torch.Tensor:
    return torch.randn(examples, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def fit(module: pl.LightningModule, loader: Any, **kwargs: Any) -> pl.Trainer:
    trainer = pl.Trainer(max_epochs=1, **QUIET, **kwargs)
    trainer.fit(module, loader)
    return trainer


def test_lightning_accumulates_inexactly() -> None:
    """10 examples in micro-batches of 4, 4 and 2 are not the batch of 10. The day they are, micro-batching can go."""
    split, whole = Plain(), Plain()
    fit(split, DataLoader(TensorDataset(inputs()), batch_size=4), accumulate_grad_batches=3)
    fit(whole, DataLoader(TensorDataset(inputs()), batch_size=10))
    assert (split.layer.weight - whole.layer.weight).abs().max() > 1e-3


def test_a_plain_iterable_is_left_alone() -> None:
    class Loader:
        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Any:
            yield from [[inputs()], [inputs()]]

    loader = Loader()
    trainer = fit(Plain(), loader)
    assert trainer.train_dataloader is loader


def test_the_loader_is_iterated_after_the_state_is_restored() -> None:
    seen = []

    class Data(pl.LightningDataModule):
        def load_state_dict(self, state_dict: dict) -> None:
            seen.append("restored")

        def state_dict(self) -> dict:
            return {"step": 1}

        def train_dataloader(self) -> Any:
            class Loader:
                def __len__(self) -> int:
                    return 2

                def __iter__(self) -> Any:
                    seen.append("iterated")
                    yield from [[inputs()], [inputs()]]

            return Loader()

    trainer = pl.Trainer(max_epochs=1, **QUIET)
    trainer.fit(Plain(), datamodule=Data())
    trainer.save_checkpoint("c.ckpt")
    seen.clear()
    pl.Trainer(max_epochs=2, **QUIET).fit(Plain(), datamodule=Data(), ckpt_path="c.ckpt")
    assert seen[:2] == ["restored", "iterated"]


def test_lightning_writes_checkpoints_through_the_temporary_folder_or_in_place() -> None:
    """Where this changes to write, flush and rename beside the target, `DurableIO` can go."""
    assert "os.fsync" not in inspect.getsource(cloud_io._atomic_save)


PRIVATE = {
    "_TrainingEpochLoop": (training_epoch_loop, "loop.py is one; tests/batchwise/test_loop.py holds it against it"),
    "_AutomaticOptimization": (automatic, "loop.py is one"),
    "_DataLoaderIterDataFetcher": (fetchers, "takes the long way"),
    "_LoggerConnector": (logger_connector, "tasks/logs.py is one"),
    "_ResultCollection": (result, "tasks/logs.py is one"),
    "_Metadata": (result, "the arguments of self.log"),
    "_call_callback_hooks": (call, "tasks/hooks.py calls on_before_zero_grad as Lightning does"),
    "_call_lightning_module_hook": (call, "the same for the task"),
    "_foreach_norm": (torch, "the check for finite numbers"),
    "_foreach_mul_": (torch, "the one division"),
    "_foreach_lerp_": (torch, "the moving average"),
}
"""Private names of modules, and who uses them."""


@pytest.mark.parametrize("name", PRIVATE)
def test_private_names_of_modules(name: str) -> None:
    module, _ = PRIVATE[name]
    assert callable(getattr(module, name))


def test_private_names_of_torchmetrics() -> None:
    """What tasks/measures.py touches: whether metrics are joined, and the states that they begin with."""
    metrics = MetricCollection({"mean": MeanMetric()})
    assert metrics._enable_compute_groups is True
    assert MetricCollection({"mean": MeanMetric()}, compute_groups=False)._enable_compute_groups is False
    mean = MeanMetric()
    assert mean._defaults.keys() == mean.metric_state.keys() == {"mean_value", "weight"}


def test_wandb_counts_its_steps() -> None:
    with wandb.init(mode="offline", dir=".") as run:
        assert (run.starting_step, run._local_step) == (0, 0)
        run.log({"x": 1})
        assert run._local_step == 1


def test_private_names_of_objects() -> None:
    """What loop.py, checkpoint.py, hooks.py and python.py touch besides; the tests of these hold its behaviour."""
    trainer = pl.Trainer(max_epochs=1, **QUIET)
    loop, fit_loop = trainer.fit_loop.epoch_loop, trainer.fit_loop
    for name in ("_num_ready_batches_reached", "_is_training_done", "_results", "batch_progress", "val_loop"):
        assert hasattr(loop, name)
    assert loop.automatic_optimization.optim_progress.optimizer.step.total.completed == trainer.global_step == 0
    assert fit_loop._can_stop_early is True
    assert fit_loop._restarting is False
    for name in ("on_batch_start", "on_batch_end", "update_train_step_metrics"):
        assert callable(getattr(trainer._logger_connector, name))
    trainer._default_root_dir = "elsewhere"
    trainer._logger_connector.configure_logger(True)
    assert trainer.default_root_dir.endswith("elsewhere")
    assert (trainer.logger.save_dir or "").endswith("elsewhere")  # type: ignore[union-attr]
    assert Plain()._current_fx_name is None
    checkpoint = ModelCheckpoint(every_n_train_steps=3)
    assert (checkpoint._every_n_train_steps, checkpoint._train_time_interval) == (3, None)
    assert checkpoint._enable_version_counter is True
    assert callable(RichProgressBar._get_train_description)
    assert "_layer_sync" in vars(DDPStrategy())
    assert ModelParallelStrategy()._tensor_parallel_size == "auto"
    assert callable(DDPStrategy().block_backward_sync)


class Base:
    pass


class First(Base):
    def __init__(self, lr: float = 0.1) -> None:
        self.lr = lr


class Second(Base):
    def __init__(self, lr: float = 0.2) -> None:
        self.lr = lr


def test_jsonargparse_keeps_settings_of_another_class_unless_told() -> None:
    """`batchwise.run.parser` replaces one function of jsonargparse; else `lr` would be that of the other class."""
    import batchwise.run.parser

    assert _typehints.discard_init_args_on_class_path_change is batchwise.run.parser._forget_settings
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Base, "it")
    parser.set_defaults({"it": {"class_path": f"{__name__}.First", "init_args": {"lr": 5.0}}})
    assert parser.parse_args([f"--it={__name__}.Second"]).it.init_args.lr == 0.2


def test_jsonargparse_imports_what_a_path_names_by_a_function_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """`batchwise.run.parser` names the user's file and line where an import fails; else its words stood alone."""
    import batchwise.run.parser

    assert _typehints.import_object is batchwise.run.parser._import  # type: ignore[attr-defined]
    asked = []
    monkeypatch.setattr(_typehints, "import_object", lambda path, *_, **__: asked.append(path) or First)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Base, "it")
    parser.parse_args([f"--it={__name__}.First"])
    assert f"{__name__}.First" in asked


def test_what_is_used_of_jsonargparse_to_name_a_key() -> None:
    """`batchwise.run.parser` finds the keys around a nested class on the stack, and whether a value is a list."""
    assert inspect.isfunction(_typehints.ActionTypeHint._check_type)
    parser = ArgumentParser()
    parser.add_argument("--it", type=list[int])
    (action,) = [action for action in parser._actions if action.dest == "it"]
    assert action._typehint == list[int]  # type: ignore[attr-defined]


def test_fused_sgd_on_a_cpu_does_not_move_half_precision() -> None:
    """So the task does not ask for it there."""
    moved = {}
    for fused in (False, True):
        parameter = torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
        parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD([parameter], lr=1.0, fused=fused).step()
        moved[fused] = int((parameter != 0).sum())
    assert moved[False] == 64
    assert moved[True] < 64
