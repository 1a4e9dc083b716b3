"""W&B that never stops training: without a key, a network or a server, it logs offline and says so in one line."""

import os
from typing import Any

import lightning.pytorch.loggers as loggers
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

INIT_TIMEOUT = 20  # seconds; without a network W&B itself waits 90 and then ends the run


class WandbLogger(loggers.WandbLogger):
    """Lightning's WandbLogger, which goes offline instead of failing.

    Args:
        offline: log into the run's folder, without an account; `wandb sync` uploads it later.
        project: the W&B project.
        save_dir: where its files go; a relative path lies in the run's folder.
        name: of the run in W&B; null: W&B makes one.
        id: of the run in W&B; null: the name and time of the run's folder, so that a resumed run continues its curves.
        group: of the run in W&B.
        tags: of the run in W&B.
        log_model: upload checkpoints, as in Lightning.
    """

    def __init__(
        self,
        offline: bool = True,
        project: str = "batchwise",
        save_dir: str = ".",
        name: str | None = None,
        id: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        log_model: bool = False,
    ) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        super().__init__(
            name=name, save_dir=save_dir, offline=offline, project=project, id=id, log_model=log_model, group=group,
            tags=tags,
        )  # fmt: skip
        self._wandb_init.pop("anonymous", None)  # W&B warns that it has no effect
        self._broken = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run; made when first asked for."""
        if self._experiment is not None:
            return self._experiment
        import wandb

        # `wandb.init` is called here and not by Lightning, so that its settings are known and it can be tried twice.
        for offline in (self._offline, True):
            try:
                if not offline and not wandb.Api(timeout=INIT_TIMEOUT).api_key:
                    raise RuntimeError("no API key is set (`wandb login`, or WANDB_API_KEY)")
                self._experiment = wandb.init(
                    **self._wandb_init,
                    mode="offline" if offline else "online",
                    settings=wandb.Settings(init_timeout=INIT_TIMEOUT, console="off", silent=True),
                )
                self._experiment.define_metric("trainer/global_step")
                self._experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
                return self._experiment
            except Exception as error:
                if offline:
                    raise
                self._offline = True
                print(f"W&B: {_first_line(error)}; logging offline, upload later with: wandb sync", flush=True)
        raise AssertionError

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log metrics; a failure of W&B is said once and ends the logging, not the training."""
        self._safely(super().log_metrics, metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log the configuration."""
        self._safely(super().log_hyperparams, params)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Log pictures."""
        self._safely(super().log_image, key, images, step, **kwargs)

    @rank_zero_only
    def log_table(self, key: str, *args: Any, **kwargs: Any) -> None:
        """Log a table, which texts are too."""
        self._safely(super().log_table, key, *args, **kwargs)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Finish the W&B run, so that its file is whole when training ends."""
        self._safely(super().finalize, status)
        if self._experiment is not None:
            self._safely(self._experiment.finish, 0 if status == "success" else 1)

    @property
    def offline_folder(self) -> str | None:
        """The folder that `wandb sync` uploads, where the run is offline and has begun."""
        return os.path.dirname(self._experiment.dir) if self._offline and self._experiment is not None else None

    def _safely(self, function: Any, *args: Any, **kwargs: Any) -> None:
        if self._broken:
            return
        try:
            function(*args, **kwargs)
        except Exception as error:
            self._broken = True
            print(f"W&B failed ({_first_line(error)}): training goes on, without logging to it", flush=True)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
