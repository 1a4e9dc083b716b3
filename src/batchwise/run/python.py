"""The trainer of scripts and notebooks. It checks, reports and keeps a training as the command line does."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from batchwise import trainer
from batchwise.arguments import typed
from batchwise.callbacks.phases import Phases
from batchwise.data.module import DataModule
from batchwise.errors import Mistake, mistakes
from batchwise.run import checks, folders, report, resume
from batchwise.run.record import RunRecord
from batchwise.run.usual import add_progress_bar, leave_out_unfounded_warnings, usual_callbacks
from batchwise.run.wandb import WandbLogger
from batchwise.tasks.task import Task
from batchwise.trainer import listed


class Trainer(trainer.Trainer):
    """Lightning's Trainer, with exact batches. Each trainer has a folder, `<default_root_dir>/<name>/<time>/`.

    `fit` checks the run, prints its plan and a line per epoch, and keeps `best.ckpt`, `last.ckpt` and the log. If
    neither a log nor checkpoints are to be kept, there is no folder.

    Args:
        name: name of the experiment: a folder in `default_root_dir`.
        default_root_dir: the folder of all experiments; None: `runs`.
        logger: None: W&B, offline, without an account; True: Lightning's TensorBoard or CSV logger; False: none. Your
            own loggers write where you say.
        callbacks: your callbacks. Those that the command line adds are added, unless they are among them.
        enable_checkpointing: keep checkpoints.
        enable_progress_bar: None: a bar in a terminal, and only a line per epoch elsewhere; True: Lightning's.
        **kwargs: arguments of `batchwise.trainer.Trainer`.
    """

    @typed
    def __init__(
        self,
        *,
        name: str = "run",
        default_root_dir: str | PathLike[str] | None = None,
        logger: Logger | list[Logger] | bool | None = None,
        callbacks: list[Callback] | Callback | None = None,
        enable_checkpointing: bool = True,
        enable_progress_bar: bool | None = None,
        **kwargs: Any,
    ) -> None:
        leave_out_unfounded_warnings()
        self.name, self.root = name, Path(default_root_dir or "runs")
        folders.check_name(name, self.root)
        self.folder: Path | None = None
        """The folder of this trainer; None: there is none yet."""
        trial = bool(kwargs.get("fast_dev_run"))
        self._saves, self._wanted_logger = enable_checkpointing and not trial, False if trial else logger
        given = listed(callbacks)
        if enable_progress_bar is None:
            enable_progress_bar = add_progress_bar(given)
        super().__init__(
            default_root_dir=default_root_dir,
            logger=False if logger is None or logger is True else logger,  # those go into the folder, which comes later
            callbacks=[*given, RunRecord(None, "fit")],
            # Lightning would add a callback of its own.
            enable_checkpointing=enable_checkpointing and any(isinstance(one, Checkpoint) for one in given),
            enable_progress_bar=enable_progress_bar,
            **kwargs,
        )

    def fit(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        *,
        force: bool = False,
    ) -> None:
        """Train.

        Args:
            model: a `Task`.
            train_dataloaders: a `DataModule`.
            val_dataloaders: none: the `DataModule` has the validation examples.
            datamodule: a `DataModule`, if `train_dataloaders` is none.
            ckpt_path: `last` or `best`, of this trainer or of the newest run of that name; or a file. Training goes on
                from there.
            weights_only: as in Lightning.
            force: go on even if the data or the batch has changed.
        """
        data = train_dataloaders if datamodule is None else datamodule
        if not (isinstance(model, Task) and isinstance(data, DataModule)):
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)
            return
        if val_dataloaders is not None or train_dataloaders not in (None, data):
            raise Mistake("fit got a DataModule and further loaders: leave them out, because its load has all splits")
        with self._in_folder("fit", model, ckpt_path) as checkpoint:
            self.phases = Phases(perf_counter())
            self.callbacks += usual_callbacks(model, self.callbacks, self._saves, self.folder or self.root)
            done = checks.check(self, model, data, "fit", checkpoint, None if force else {})
            if not checks.forks(self):  # the table says how the device is fed
                report.plan(model, data, done if checkpoint else self.global_step, checkpoint)
            super().fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=weights_only)
            if self.folder is not None:
                report.training(self, self.folder)
                report.look(self)

    def validate(
        self, model: Any = None, dataloaders: Any = None, ckpt_path: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Validate, as in Lightning. `ckpt_path` may be `last` or `best`, as in `fit`."""
        with self._in_folder("validate", model, ckpt_path) as checkpoint:
            return super().validate(model, dataloaders, checkpoint, *args, **kwargs)

    def test(self, model: Any = None, dataloaders: Any = None, ckpt_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Test, as in Lightning. `ckpt_path` may be `last` or `best`, as in `fit`."""
        with self._in_folder("test", model, ckpt_path) as checkpoint:
            return super().test(model, dataloaders, checkpoint, *args, **kwargs)

    def predict(self, model: Any = None, *args: Any, ckpt_path: Any = None, **kwargs: Any) -> Any:
        """Predict, as in Lightning. `ckpt_path` may be `last` or `best`, as in `fit`."""
        with self._in_folder("predict", model, ckpt_path) as checkpoint:
            return super().predict(model, *args, ckpt_path=checkpoint, **kwargs)

    @contextmanager
    def _in_folder(self, verb: str, model: Any, which: str | Path | None) -> Iterator[Path | None]:
        """Make the folder, if anything is to be kept. Yield the checkpoint to start from.

        Args:
            verb: fit, validate, test or predict.
            model: None: evaluate the one of the last training, as it was at its best.
            which: `ckpt_path`.
        """
        checkpoint = self._checkpoint(verb, model, which)
        try:
            if self._saves or self._wanted_logger is not False:
                self._make_folder(checkpoint, restart=which == "last")
                if verb == "fit" and self._saves and self.folder is not None:
                    with mistakes():
                        folders.hold(self.folder)
            if isinstance(model, Task):
                resume.leave_out_initial_weights(model, checkpoint)
            yield checkpoint
        finally:
            folders.forget(self.folder)  # which only the first training in it shares

    def _checkpoint(self, verb: str, model: Any, which: str | Path | None) -> Path | None:
        if which is None and model is not None:
            return None
        own = ""
        if which in (None, "best"):
            own = getattr(self.checkpoint_callback, "best_model_path", "")
        elif which == "last" and self.folder is not None:
            own = self.folder / "checkpoints" / "last.ckpt"
        if own and Path(own).exists():
            return Path(own)
        if which is None:  # the best of another training is not what was meant
            raise Mistake(
                f"this trainer has kept no best checkpoint: write {verb}(task, ...), which takes the task as it is, or "
                "ckpt_path"
            )
        return resume.choose_checkpoint(str(which), self.root, self.name, verb)

    def _make_folder(self, checkpoint: Path | None, restart: bool) -> None:
        if self.folder is None:
            self.folder = folder = self._agreed_folder(checkpoint, restart)
            self._default_root_dir = str(folder)
            if self._wanted_logger is None:
                self.loggers = [WandbLogger(save_dir=str(folder.absolute()), id=folders.run_id(folder))]
            elif self._wanted_logger is True:
                self._logger_connector.configure_logger(True)
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)

    def _agreed_folder(self, checkpoint: Path | None, restart: bool) -> Path:
        """Return a folder that is the same in all processes of this training."""

        def choose() -> Path:
            return folders.choose_folder(self.root, self.name, checkpoint, restart)

        if not torch.distributed.is_initialized():
            return choose()
        # An earlier training of the same script has brought the processes together.
        told = [choose() if rank_zero_only.rank == 0 else Path()]
        torch.distributed.broadcast_object_list(told)
        return told[0]
