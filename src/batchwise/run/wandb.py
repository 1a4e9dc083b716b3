"""A logger for W&B that never stops training. A resumed training is one run in W&B, without a gap."""

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch.loggers as loggers
from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only

from batchwise.host import write_whole
from batchwise.run import program
from batchwise.run.redact import hide

INIT_TIMEOUT = 20  # seconds; without a network W&B itself waits 90 and then ends the run
FINISH_TIMEOUT = 60  # seconds for the rest of the upload at the end; W&B itself waits for ever
REFUSED = {"id": ":;,#?/'", "project": "/\\#?%:"}
"""The characters that W&B does not take."""
MODES = (None, "online", "offline", "disabled", "dryrun", "run", "shared")
"""The values of WANDB_MODE; dryrun and run are W&B's old names."""
RECENT = 60.0  # seconds of rows that a checkpoint holds; W&B writes its file every 15


class WandbLogger(loggers.WandbLogger):
    """Lightning's WandbLogger. It goes offline instead of failing, and a resumed training continues the same run.

    All metrics of a step are one row in W&B. The step of the row is the number of optimizer steps done. A row is handed
    over when the next step has one.

    Training that is resumed repeats the steps since its checkpoint. A crash also loses rows that W&B has not written
    yet. So each checkpoint holds the rows of the last minute, and a resumed training logs them again. Which of all
    these rows W&B has already is decided by the step alone:

    - After a run that ended (also by a signal or an error), a file beside its log holds the last step that was handed
      over. Rows up to that step are not logged again.
    - After a crash (`kill -9`, power) of a run that logs online, W&B's server tells its last step when the run is
      resumed. W&B's client drops rows up to that step.
    - After a crash of a run that logs offline, rows may stand twice: in the files of both parts, with the same step.
      Their figures are equal, because resumed training is exact (times and speeds differ). `wandb sync` uploads the
      files in order of time and each row as it stands; it does not look at the step.

    No row is missing in any of these cases.

    Args:
        offline: log into the run's folder, without an account; `wandb sync` uploads it later.
        project: the W&B project; null: the name of your package.
        save_dir: folder of its files; a relative path lies in the run's folder.
        name: name of the run in W&B; null: W&B makes one.
        id: id of the run in W&B; null: name and time of the run's folder. A resumed training has the same.
        group: group of the run in W&B, such as the name of a sweep.
        tags: tags of the run in W&B.
        log_model: when training is done, keep its best and its last checkpoint as versions of a W&B artifact, with the
            aliases `best` and `last`.

    The environment variable WANDB_MODE turns W&B off (disabled), or keeps it offline also with `offline: false`.

    Raises:
        ValueError: W&B takes no such project, id or mode.
    """

    def __init__(
        self,
        offline: bool = True,
        project: str | None = None,
        save_dir: str = ".",
        name: str | None = None,
        id: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        log_model: bool = False,
    ) -> None:
        mode = _checked(id, project)
        offline = offline or mode in ("offline", "dryrun")
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        super().__init__(
            name=name,
            save_dir=save_dir,
            offline=offline,
            project=project or program.name,
            id=id,
            group=group,
            tags=tags,
        )
        self._wandb_init.pop("anonymous", None)  # W&B warns that it has no effect
        self._upload_checkpoints = log_model
        self._broken = mode == "disabled"
        self._recent: deque[tuple[float, int, dict[str, Any]]] = deque()  # time, step, metrics
        self._step, self._row = -1, {}  # the row that is not handed over yet
        self._taken = -1  # the newest step of a row in W&B's own count
        self._ended_at = -1  # the last step that W&B had when an earlier part of this training ended
        self.folder: Path | None = None
        """The folder of the newest part of the log. A test after the training is another part."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run; made when first asked for."""
        if self._experiment is not None:
            return self._experiment
        # `wandb.init` is called here and not by Lightning, so that its settings are known and it can be tried again.
        modes: tuple[Literal["online", "offline", "disabled"], ...] = ("online", "offline", "disabled")
        for mode in modes[2 if self._broken else self._offline :]:
            try:
                import wandb

                if mode == "online" and not wandb.Api(timeout=INIT_TIMEOUT).api_key:
                    raise RuntimeError("no API key is set (`wandb login`, or WANDB_API_KEY)")
                settings = wandb.Settings(
                    init_timeout=INIT_TIMEOUT,
                    finish_timeout=FINISH_TIMEOUT,
                    finish_timeout_raises=True,
                    console="off",
                    silent=True,
                )
                with _redacted_command_line(), _quiet_log():
                    self._experiment = wandb.init(**self._wandb_init, mode=mode, settings=settings)
                if not self._broken:
                    self.folder = Path(self._experiment.dir).parent
                with suppress(FileNotFoundError, ValueError):  # a power cut may have left an empty file
                    self._ended_at = int(_end_file(self._experiment).read_text())
                self._experiment.define_metric("trainer/global_step")
                self._experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
                break
            except Exception as error:
                if self._broken:  # which was said
                    continue
                self._offline, self._broken = True, mode == "offline"
                remedy = (
                    "training goes on, without it" if self._broken else "logging offline, upload later with: wandb sync"
                )
                print(f"W&B: {_first_line(error)}; {remedy}", flush=True)
        else:
            self._experiment = _DummyExperiment()
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log metrics. A failure of W&B is reported once, and ends the logging but not the training."""
        self._safely(self._log, dict(metrics), step)

    def _log(self, metrics: dict[str, Any], step: int | None) -> None:
        run = self.experiment
        if step is None:
            self._hand_over()  # W&B accepts no earlier step afterwards
            run.log(metrics)
        elif step <= self._ended_at or all(name.startswith("summary/") for name in metrics):
            run.summary.update(metrics)  # no new point of a curve
        else:
            if step != self._step:
                self._hand_over()
            self._step, self._row = step, self._row | metrics
            now = time.monotonic()
            self._recent.append((now, step, metrics))
            while self._recent[0][0] < now - RECENT:
                self._recent.popleft()

    def _hand_over(self) -> None:
        """Give W&B the row of a step that is over."""
        if self._row:
            run = self.experiment
            # W&B drops a row whose step is below its own count. `run.log` without a step raises that count. In a
            # resumed run, W&B is to drop the rows that it has already.
            step = self._step if self._step < run.starting_step else max(self._step, run._local_step, self._taken + 1)
            self._taken = step
            run.log(self._row | {"trainer/global_step": self._step}, step=step)
        self._row = {}

    @rank_zero_only
    def recent(self) -> list[list]:
        """Return the rows of the last minute for a checkpoint: lists of a step and its metrics that are numbers."""
        rows = [[step, {k: v for k, v in row.items() if isinstance(v, int | float)}] for _, step, row in self._recent]
        return [row for row in rows if row[1]]

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log the configuration."""
        self._safely(super().log_hyperparams, params)

    @rank_zero_only
    def log_image(self, key: str, images: list, step: int | None = None, **kwargs: Any) -> None:
        """Log pictures."""
        self._safely(super().log_image, key, images, step, **kwargs)

    def after_save_checkpoint(self, checkpoint_callback: Checkpoint) -> None:
        """Do nothing: checkpoints are uploaded at the end."""

    @rank_zero_only
    def log_table(self, key: str, *args: Any, **kwargs: Any) -> None:
        """Log a table. Texts are logged as tables too."""
        self._safely(super().log_table, key, *args, **kwargs)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Finish the W&B run, so that its file is complete when training ends.

        If training has failed, the row of the last step is not handed over: metrics may be missing in it. The resumed
        training has them, from the checkpoint.
        """
        if self._experiment is None:
            return
        last = self._step
        if status == "success":
            self._safely(self._hand_over)
            if self._upload_checkpoints:
                self._safely(self._log_checkpoints)
        elif self._row:
            last -= 1
        run, self._experiment = self._experiment, None
        self._step, self._row, self._taken = -1, {}, -1
        try:
            run.finish(0 if status == "success" else 1)
            if not self._broken:
                write_whole(_end_file(run), str(max(last, self._ended_at)))
        except Exception as error:
            self._offline = True
            print(f"W&B: {_first_line(error)}; upload later with: wandb sync", flush=True)

    def _log_checkpoints(self) -> None:
        import wandb

        for name in ("last", "best"):
            path = Path(str(self.save_dir)) / "checkpoints" / f"{name}.ckpt"
            if path.exists():
                artifact = wandb.Artifact(f"model-{self.experiment.id}", type="model")
                artifact.add_file(str(path), name="model.ckpt")
                self.experiment.log_artifact(artifact, aliases=[name])

    @property
    def offline_folder(self) -> str | None:
        """The folder that `wandb sync` uploads, or a pattern for those of all parts; None: there is none."""
        folder = self.folder
        if not self._offline or self._broken or folder is None:
            return None
        parts = list(folder.parent.glob(f"*run-*-{self._id}"))
        return str(folder if len(parts) == 1 else folder.with_name(f"*run-*-{self._id}"))

    def _safely(self, function: Callable[..., object], *args: object, **kwargs: object) -> None:
        if self._broken:
            return
        try:
            function(*args, **kwargs)
        except Exception as error:
            self._broken = True
            print(f"W&B failed ({_first_line(error)}): training goes on, without logging to it", flush=True)


def _checked(id: str | None, project: str | None) -> str | None:
    """Return the mode that the environment asks for; None: none. Raise ValueError for what W&B does not take."""
    for key, value in {"id": id, "project": project}.items():
        if found := set(value or "") & set(REFUSED[key]):
            raise ValueError(
                f"trainer.logger.{key} is {value!r}, and W&B takes no {' '.join(sorted(found))} in it: write letters "
                "and digits"
            )
    mode = os.environ.get("WANDB_MODE") or None
    if mode not in MODES:
        raise ValueError(f"WANDB_MODE is {mode!r}: write online, offline or disabled")
    return mode


def _end_file(run: Any) -> Path:
    return Path(run.dir).parents[1] / f"{run.id}.last-step"


@contextmanager
def _redacted_command_line() -> Iterator[None]:
    """Hide secrets from W&B, which keeps the command line."""
    arguments, sys.argv = sys.argv, [hide(argument) for argument in sys.argv]
    try:
        yield
    finally:
        sys.argv = arguments


@contextmanager
def _quiet_log() -> Iterator[None]:
    """Let W&B start without a traceback for each line that its own log does not take, as on a full disk."""
    before, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    finally:
        logging.raiseExceptions = before
    for handler in logging.getLogger("wandb").handlers:
        handler.handleError = lambda record: None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
