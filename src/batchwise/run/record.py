"""The record of a run: its full configuration and batch plan, in its folder, its log and its checkpoints."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import Callback

from batchwise.host import write_whole
from batchwise.run import folders
from batchwise.run.checks import check_schedulers
from batchwise.run.resume import ended_by, keep_the_best, settings_of, stay_ended
from batchwise.run.wandb import WandbLogger
from batchwise.tasks.task import Task


class RunRecord(Callback):
    """Writes the merged configuration to the run's folder, to the loggers, and into each checkpoint.

    Args:
        config: the merged configuration, in plain types; None: there is none, because the run was made in Python.
        command: the subcommand. It names the file, so that `test` does not overwrite the configuration of `fit`.
    """

    def __init__(self, config: dict[str, Any] | None, command: str) -> None:
        self.config = config
        self.command = command

    def setup(self, trainer: pl.Trainer, pl_module: Task, stage: str) -> None:
        """Write and log the configuration."""
        if not trainer.is_global_zero:
            return
        folders.all_have_met()
        if self.config is not None:
            path = Path(trainer.default_root_dir) / ("config.yaml" if self.command == "fit" else f"{self.command}.yaml")
            write_whole(path, yaml.safe_dump(self.config, sort_keys=False))
        if self.command == stage == "fit":
            plan = {"plan": pl_module.data.plan.table(pl_module.data.total_steps())}  # type: ignore[union-attr]
            for logger in trainer.loggers:
                logger.log_hyperparams(plan if self.config is None else {"config": self.config} | plan)
                if isinstance(logger, WandbLogger) and logger.folder is not None:
                    folders.link(logger.folder, folders.logs(Path(trainer.default_root_dir)))

    def on_train_start(self, trainer: Any, pl_module: Task) -> None:
        """Refuse a schedule that waits for a value which nobody measures."""
        check_schedulers(trainer, pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Task, checkpoint: dict[str, Any]) -> None:
        """Keep the settings that decide result and end, to compare on resume, and the last rows of the log.

        Other loggers write their rows now, because a training that is resumed from here does not repeat them.
        """
        if self.config is not None:
            checkpoint["config"] = {key: self.config[key] for key in ("model", "data")}
        checkpoint["settings"] = settings_of(trainer, pl_module)
        checkpoint["ended_by"] = ended_by(trainer)
        checkpoint["length"] = pl_module.data.total_examples()
        checkpoint["log"] = next((logger.recent() for logger in trainer.loggers if isinstance(logger, WandbLogger)), [])
        for logger in trainer.loggers:
            logger.save()

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Task, checkpoint: dict[str, Any]) -> None:
        """Go on with what is in the checkpoint beside the training: the best, an early end, the schedule, and rows."""
        if trainer.state.fn != "fit":
            return
        keep_the_best(checkpoint, trainer)
        stay_ended(checkpoint, trainer)
        old, new = checkpoint.get("length"), pl_module.data.total_examples()
        if pl_module._rates.schedule.needs_end and old not in (None, new) and trainer.is_global_zero:
            print(
                f"model.schedule is now that of {new:,.0f} examples, and was that of {old:,.0f}: the rate changes here"
            )
        for step, row in checkpoint.get("log") or []:
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_metrics(row, step)
