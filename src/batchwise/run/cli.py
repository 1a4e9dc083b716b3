"""The command line: Lightning's CLI with run folders, checks before training, and one line for a mistake."""

import copy
import hashlib
import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from batchwise.batching.fetch import DataError
from batchwise.callbacks.checkpoint import Last
from batchwise.callbacks.ema import EMA
from batchwise.callbacks.epoch_line import EpochLine
from batchwise.callbacks.predictions import Predictions
from batchwise.callbacks.progress import ProgressBar
from batchwise.callbacks.summary import Summary
from batchwise.checkpoints import read_checkpoint, unreadable
from batchwise.choosing import automatic
from batchwise.choosing.sweep import Recipe
from batchwise.data.examples import SPLITS
from batchwise.data.module import LIMIT_FILE, DataModule
from batchwise.errors import Mistake, TrainingStopped, lost_connection, mistakes
from batchwise.models.weights import weight_differences
from batchwise.run import folders as runs
from batchwise.run import program, resume
from batchwise.run.parser import Parser, check_files, explain
from batchwise.run.record import RunRecord
from batchwise.run.redact import hide, redact
from batchwise.run.verbs import CommandTrainer
from batchwise.run.wandb import WandbLogger
from batchwise.tasks.task import Task

LOGGER = {"class_path": "batchwise.run.wandb.WandbLogger"}
"""What a run logs to, unless the configuration says otherwise: W&B, into the run's folder, without an account."""

UNFOUNDED = (
    "sync_dist",  # a metric that is the same on all devices, by construction, need not be averaged over them
    "args parameter is intended to run from within Python",
    "Checkpoint directory .* exists and is not empty",
    "callbacks used to create the checkpoint need to be provided",
    "your dataloader is not resumable",  # ours is, by the step alone
    "LeafSpec",
    "could not find the monitored key",  # it was checked; validation has not run yet
    "`broadcast_buffers` is deprecated",
    "smaller than the logging interval",
    "in eval mode at the start of training",  # frozen batch norms are meant to be
)
"""Warnings of Lightning and PyTorch that are wrong here, or none of the user's business."""


class CLI(LightningCLI):
    """`fit`, `validate`, `test`, `predict`, `inspect`, `tune`, `sweep`, each in a run's folder of its own."""

    datamodule: DataModule
    model: Task
    trainer: CommandTrainer

    def __init__(self, arguments: list[str]) -> None:
        self.verb = next((argument for argument in arguments if not argument.startswith("-")), None)
        self.folder = Path()
        self.checkpoint: Path | None = None
        self.steps_done = 0
        super().__init__(
            Task,
            DataModule,
            save_config_callback=None,
            trainer_class=CommandTrainer,
            seed_everything_default=0,
            parser_class=Parser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=arguments,
        )

    @property
    def settings(self) -> Namespace:
        """The configuration of the subcommand."""
        return self.config[self.config.subcommand]

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the verbs, which are methods of the trainer, and which of their arguments are not options.

        Only the one that is asked for, if it is one: making the parser of each takes 20 milliseconds.
        """
        own = {"model", "datamodule"}
        verbs = LightningCLI.subcommands() | {"inspect": own, "tune": own, "sweep": own}
        return {self.verb: verbs[self.verb]} if self.verb in verbs else verbs

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add what belongs to the run and not to the trainer."""
        parser.add_argument("--name", type=str, default="run", help="name of the experiment: a folder in the root")
        parser.add_argument(
            "--force", type=bool, default=False, help="resume even where model, data or batch have changed"
        )
        parser.add_argument(
            "--speed",
            type=Literal["auto"] | None,
            default=None,
            help="auto: measure a few steps, and set what is not set of precision, memory format, micro-batch, threads",
        )
        parser.add_argument(
            "--predictions", type=str, default="predictions.csv", help="what predict writes: a .csv or .parquet file"
        )
        parser.set_defaults({"trainer.default_root_dir": "runs", "trainer.logger": LOGGER})

    def _parse_ckpt_path(self) -> None:
        """Do not let values of a checkpoint override the command line, as Lightning does: differences are errors."""

    # The run's folder

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint and the folder, and put the loggers there."""
        with mistakes():
            self._place_run()

    def _place_run(self) -> None:
        settings = self.settings
        root = Path(settings.trainer.default_root_dir or "runs")
        if Path(settings.name).is_absolute() or ".." in Path(settings.name).parts or not settings.name:
            raise ValueError(f"name is {settings.name!r}: write the name of a folder that is to lie in {root}")
        takes_checkpoint = "ckpt_path" in settings
        self.restart = takes_checkpoint and settings.ckpt_path == "last"
        if takes_checkpoint:
            self.checkpoint = self._find_checkpoint(root)
            settings.ckpt_path = None if self.checkpoint is None else str(self.checkpoint)
            if settings.weights_only is None:
                settings.weights_only = True
        self.folder = self._choose_folder(root)
        self.plain_config = redact(yaml.safe_load(self.parser.dump(self.config, skip_none=False)))[
            self.config.subcommand
        ]
        if takes_checkpoint:
            self.plain_config["ckpt_path"] = None  # the configuration of a run does not say how often it was resumed
        settings.trainer.default_root_dir = str(self.folder)
        loggers = settings.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            arguments = logger.get("init_args") if isinstance(logger, Namespace) else None
            if arguments is not None and "save_dir" in arguments:
                arguments.save_dir = str((self.folder / (arguments.save_dir or ".")).absolute())
                if "id" in arguments and arguments.id is None:
                    arguments.id = f"{self.folder.parent.name}-{self.folder.name}"

    def _find_checkpoint(self, root: Path) -> Path | None:
        settings, command = self.settings, self.config.subcommand
        which = settings.ckpt_path
        if which is None:
            if command != "fit":
                raise ValueError(f"ckpt_path is not set: write --ckpt_path best, last or a file to {command}")
            return None
        if which not in ("last", "best"):
            path = Path(which)
            if not path.is_file():
                raise ValueError(f"ckpt_path {which} does not exist: write last, best or a file")
            problem = unreadable(path)
            if problem:
                raise ValueError(f"ckpt_path {which} cannot be read: {problem}")
            return path
        found = resume.find_checkpoint(root, settings.name, which)
        if found is None:
            if command != "fit" or which == "best":
                raise ValueError(
                    f"ckpt_path {which}: no run in {root / settings.name} has such a checkpoint: fit first"
                )
            if rank_zero_only.rank == 0:  # it says it for all
                print(f"no checkpoint in {root / settings.name}: training starts afresh", flush=True)
        return found

    def _out_of_memory_folder(self, root: Path) -> Path | None:
        """Return the newest run's folder, if that run ran out of memory before its first checkpoint."""
        newest = max((root / self.settings.name).glob("*/config.yaml"), default=None)  # `inspect` leaves none
        return newest.parent if self.restart and newest and (newest.parent / LIMIT_FILE).exists() else None

    def _choose_folder(self, root: Path) -> Path:
        if runs.FOLDER in os.environ:
            return Path(os.environ[runs.FOLDER])
        theirs = runs.wait_for_folder(root / self.settings.name)
        if theirs is not None:
            return theirs
        folder = runs.folder_of(self.checkpoint) if self.checkpoint else self._out_of_memory_folder(root)
        if folder is None:
            folder = runs.new_folder(root, self.settings.name)
        else:
            runs.check_writable(folder)
        runs.share_folder(folder)
        return folder

    def instantiate_classes(self) -> None:
        """Make model, data module and trainer."""
        with mistakes():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add the callbacks that every run has."""
        settings = self._get(self.config_init, "trainer")
        if self.checkpoint is not None:
            self.model.init_from = None  # the checkpoint has the weights
        given = settings.get("callbacks") or []
        callbacks = list(given) if isinstance(given, list | tuple) else [given]
        if self.subcommand == "fit":
            if self.settings.speed == "auto" or self.datamodule.finds_micro_batch:
                self._speed_up(settings)
            saving = settings.get("enable_checkpointing") is not False
            if saving and not any(isinstance(callback, Last) for callback in callbacks):
                callbacks.append(Last())
            if saving and not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
                monitor, mode = self.model.monitor
                callbacks.append(ModelCheckpoint(monitor=monitor, mode=mode, filename="best"))
            for callback in callbacks:
                if isinstance(callback, ModelCheckpoint):
                    callback.dirpath = callback.dirpath or str(self.folder / "checkpoints")
                    callback._enable_version_counter = False
            if not any(isinstance(callback, EpochLine) for callback in callbacks):
                callbacks.append(EpochLine())
            callbacks.append(Summary())
        if self.subcommand == "predict":
            callbacks.append(Predictions(self.settings.predictions))
            settings["logger"] = False  # nothing is measured
        if not sys.stdout.isatty():
            settings["enable_progress_bar"] = False
        elif settings.get("enable_progress_bar") is not False:
            callbacks.append(ProgressBar())
        settings["callbacks"] = [*callbacks, RunRecord(self.plain_config, str(self.subcommand))]
        return super().instantiate_trainer(**kwargs)

    def _speed_up(self, settings: Any) -> None:
        """Set what is the fastest on this machine."""
        path = self.folder / automatic.FILE
        self.datamodule.prepare_data()
        self.model.prepare(self.datamodule, "train")
        gpu = settings.get("accelerator") in (None, "auto", "gpu", "cuda") and torch.cuda.is_available()
        devices = settings.get("devices")
        all_devices = torch.cuda.device_count() if gpu else 1
        automatic.measure(
            self.model,
            self.datamodule,
            settings,
            path,
            torch.device("cuda" if gpu else "cpu"),
            int(devices) if str(devices).isdecimal() else len(devices) if isinstance(devices, list) else all_devices,
            everything=self.settings.speed == "auto",
        )
        chosen = yaml.safe_load(path.read_text())
        for key, value in chosen["trainer"].items():
            if settings.get(key) is None:  # what has been set since goes before
                settings[key] = self.plain_config["trainer"][key] = value
        free = self.datamodule.micro_batch_size is None and settings.get("accumulate_grad_batches") is None
        if free and "data" in chosen:
            size = self.datamodule.micro_batch_size = chosen["data"]["micro_batch_size"]
            self.plain_config["data"].setdefault("init_args", {})["micro_batch_size"] = size
        self.plain_config["speed"] = None  # so that the saved configuration gives the same run

    # Checks before anything is trained

    def _load(self, stage: str) -> None:
        """Load the data and make the plan; the first process of a machine does."""
        self.datamodule.attach(self.trainer, self.model.unit)
        if self.trainer.local_rank == 0:
            with mistakes():
                self.datamodule.prepare_data()
                self.datamodule.setup(stage)

    def _prepare(self, stage: str) -> None:
        """Also try the network, so that a mistake is said before training starts."""
        self._load(stage)
        if self.trainer.local_rank != 0:
            return  # the first process says it for all
        with mistakes():
            self.model.prepare(self.datamodule, SPLITS[stage][0])
            self._check_checkpoint()
            if stage == "fit":
                self._check_monitors()

    def _check_monitors(self) -> None:
        if self.datamodule.split("val") is None:
            return
        known = self.model.metric_names()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if monitor is not None and monitor not in known:
                raise ValueError(
                    f"{type(callback).__name__} monitors '{monitor}', which is not measured: write one of "
                    f"{', '.join(known)}"
                )

    def _check_checkpoint(self) -> None:
        if self.checkpoint is None:
            return
        checkpoint = read_checkpoint(self.checkpoint)
        self.steps_done = checkpoint["global_step"]
        differences = weight_differences(checkpoint["state_dict"], self.model.state_dict())
        if differences:
            raise ValueError(f"ckpt_path {self.checkpoint} is of another model: {differences}")
        if self.subcommand != "fit" or self.settings.force:
            return
        averages = [callback for callback in self.trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
        changes = resume.training_differences(
            checkpoint,
            self.plain_config,
            type(self.datamodule).__qualname__,
            self.datamodule.fingerprint(),
            averages[0].half_life if averages else None,
        )
        if changes:
            raise ValueError(
                f"ckpt_path {self.checkpoint} is of a training that differs ({'; '.join(changes)}): write the old "
                "values, or --force true to go on with the new"
            )

    def before_fit(self) -> None:
        """Check, then print the plan."""
        self._prepare("fit")
        plan = self.datamodule.plan
        if plan is None:
            return  # the first process of the machine makes it and says it
        total = self.datamodule.total_steps()
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        for name, value in {"parameters": parameters, **plan.table(total)}.items():
            print(f"{name:>24}  {value:,}")
        print(f"{'feeding':>24}  {self.datamodule.feed('train')}")
        done = self.steps_done
        if done:
            print(f"resuming after step {done:,} from {self.checkpoint}")
            if done >= total:
                print(f"already trained for {done:,} of {total:,} steps: write a larger trainer.max_epochs to go on")

    def before_inspect(self) -> None:
        """Load; what is wrong with the model does not keep anyone from looking at the data."""
        self._load("fit")

    def before_tune(self) -> None:
        """Check."""
        self._prepare("fit")

    def before_sweep(self) -> None:
        """Check, and keep how to make the model anew, and what makes its training different from others."""
        self._prepare("fit")
        keys = ("accelerator", "precision", "channels_last", "compile", "threads", "gradient_clip_val")
        plain = copy.deepcopy(self.plain_config)
        size = plain["data"].get("init_args", {}).pop("batch_size", None)
        plan = self.datamodule.plan
        reference = self.model.reference_batch_size or (plan and plan.batch_size) or size
        parts = [plain["model"], reference, plain["data"], {key: plain["trainer"].get(key) for key in keys}]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]

        def model(seed: int) -> Task:
            torch.manual_seed(seed)
            settings = Namespace(model=copy.deepcopy(self.settings.model))
            return self._parser("sweep").instantiate_classes(settings)["model"]

        self.trainer.recipe = Recipe(model, digest)

    def before_validate(self) -> None:
        """Check."""
        self._prepare("validate")

    def before_test(self) -> None:
        """Check."""
        self._prepare("test")

    def before_predict(self) -> None:
        """Check."""
        self._prepare("predict")
        self.config_init["predict"]["return_predictions"] = False  # they go to a file, as they come

    def after_validate(self) -> None:
        """Print what was measured."""
        if self.trainer.is_global_zero:
            for name, value in self.trainer.callback_metrics.items():
                print(f"{name} {value:.4f}")

    after_test = after_validate

    def after_fit(self) -> None:
        """Say what came of it, where it is, and what to do next."""
        if not self.trainer.is_global_zero:
            return
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.best_model_score is not None:
                print(f"best {callback.monitor} {callback.best_model_score:.4f}: {callback.best_model_path}")
        given = [str(path) for path in self.settings.config or [self.folder / "config.yaml"]]
        print(f"run folder: {self.folder}")
        if (self.folder / "checkpoints" / "best.ckpt").exists():
            print(f"test it:    python -m {program.name} test --config {' --config '.join(given)} --ckpt_path best")
        epochs = self.trainer.max_epochs
        if epochs and epochs > 0 and (self.folder / "checkpoints" / "last.ckpt").exists():
            saved = self.folder / "config.yaml"
            longer = f"--trainer.max_epochs {2 * epochs}"
            print(f"go on:      python -m {program.name} fit --config {saved} --ckpt_path last {longer}")
        self._say_upload()

    def after_inspect(self) -> None:
        """Record the configuration, and say where the picture is."""
        RunRecord(self.plain_config, "inspect").setup(self.trainer, self.model, "fit")
        if self.trainer.is_global_zero:
            print(f"run folder: {self.folder}")
            print(f"look at it: {self.folder / 'inspect.png'}")
            self._say_upload()

    def after_tune(self) -> None:
        """Record the configuration, and say where the findings are."""
        RunRecord(self.plain_config, str(self.subcommand)).setup(self.trainer, self.model, "fit")
        if self.trainer.is_global_zero:
            print(f"run folder: {self.folder}")
            self._say_upload()

    after_sweep = after_tune

    def _say_upload(self) -> None:
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger) and logger.offline_folder:
                print(f"upload it:  wandb sync {os.path.relpath(logger.offline_folder)}")


def run(arguments: list[str]) -> int:
    """Run the command line; return its exit code."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    for pattern in UNFOUNDED:
        warnings.filterwarnings("ignore", f".*{pattern}.*")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    inherited = runs.FOLDER in os.environ
    try:
        with mistakes():
            check_files(arguments)
        CLI(arguments)
    except Mistake as error:
        if os.environ.get("BATCHWISE_TRACEBACK"):
            raise
        if not inherited and runs.FOLDER in os.environ:
            runs.remove_if_empty(Path(os.environ[runs.FOLDER]))
        return _fail(error, 2)
    except TrainingStopped as error:
        silent = error.everywhere and rank_zero_only.rank != 0
        return error.code if silent else _fail(error, error.code)
    except DataError as error:
        return _fail(error, 1)
    except RuntimeError as error:
        if not lost_connection(error):
            raise
        detail = re.sub(r"^\[/.*?\] ", "", str(error).splitlines()[0]).partition(". This ")[0]
        reason = f"another process has died, or its machine cannot be reached ({detail})"
        return _fail(TrainingStopped(f"{reason}: the same command with --ckpt_path last goes on"), 1)
    finally:
        if not inherited:
            runs.all_have_met()
            os.environ.pop(runs.FOLDER, None)
    return 0


def _fail(error: Exception, code: int) -> int:
    print(f"error: {hide(explain(str(error), []))}", file=sys.stderr)
    return code
