"""The command line: Lightning's CLI, whose runs have a folder, are checked before training, and end in plain lines."""

import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning.pytorch as pl
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from batchwise.callbacks.predictions import Predictions
from batchwise.data.examples import SPLITS
from batchwise.data.module import DataModule
from batchwise.errors import Mistake, mistakes
from batchwise.output import write_nowhere
from batchwise.run import checks, folders, report, resume
from batchwise.run.auto import choose_settings
from batchwise.run.configuration import check_files, texts
from batchwise.run.main import LEADER
from batchwise.run.parser import Parser, plain
from batchwise.run.record import RunRecord
from batchwise.run.redact import redact
from batchwise.run.usual import add_progress_bar, leave_out_unfounded_warnings, usual_callbacks
from batchwise.run.verbs import CommandTrainer, recipe
from batchwise.tasks.task import Task
from batchwise.trainer import listed

LOGGER = {"class_path": "batchwise.run.wandb.WandbLogger"}
"""The default logger: W&B, into the run's folder, without an account."""
ENDS = (signal.SIGTERM, signal.SIGHUP)
"""The signals that end a command: SIGHUP comes where the terminal was closed."""
OF_LIGHTNINGS_VERBS = ("ckpt_path", "weights_only", "verbose", "return_predictions")
"""What the configuration of a run leaves out, so that every command takes it, and it is the same after a resume."""


class CLI(LightningCLI):
    """The verbs of Lightning, and `inspect`, `tune`, `sweep`, `export` and `shards`. Each run has a folder."""

    datamodule: DataModule
    model: Task
    trainer: CommandTrainer

    def __init__(self, arguments: list[str]) -> None:
        self.verb = verb_of(arguments)
        self.arguments, self.folder, self.trial = arguments, Path(), False
        self.checkpoint: Path | None = None
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
        """Return the verbs, which are methods of the trainer, each with its arguments that are not options.

        A known verb is returned alone, because making the parser of each takes 20 milliseconds.
        """
        own = {"model", "datamodule"}
        verbs = LightningCLI.subcommands() | dict.fromkeys(("inspect", "tune", "sweep", "export", "shards"), own)
        return {self.verb: verbs[self.verb]} if self.verb in verbs else verbs

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of the run, which are not the trainer's."""
        parser.add_argument("--name", type=str, default="run", help="name of the experiment: a folder in the root")
        parser.add_argument(
            "--force", type=bool, default=False, help="resume even if model, data or batch have changed"
        )
        parser.add_argument(
            "--speed",
            type=Literal["auto"] | None,
            default=None,
            help="auto: measure a few steps, and set those keys of precision, memory and threads that are not set",
        )
        parser.add_argument(
            "--predictions", type=str, default="predictions.csv", help="what predict writes: a .csv or .parquet file"
        )
        parser.set_defaults({"trainer.default_root_dir": "runs", "trainer.logger": LOGGER})

    def _parse_ckpt_path(self) -> None:
        """Do nothing. Lightning lets a checkpoint override the command line, but here differences are errors."""

    @mistakes()
    def before_instantiate_classes(self) -> None:
        """Find the checkpoint and the folder, and put the loggers there."""
        settings, command = self.settings, self.config.subcommand
        root = Path(settings.trainer.default_root_dir or "runs").expanduser()
        folders.check_name(settings.name, root)
        restart = settings.get("ckpt_path") == "last"
        if "ckpt_path" in settings:
            self.checkpoint = resume.choose_checkpoint(settings.ckpt_path, root, settings.name, command)
            settings.ckpt_path = None if self.checkpoint is None else str(self.checkpoint)
            if "weights_only" in settings and settings.weights_only is None:
                settings.weights_only = True
        self.trial = command in SPLITS and bool(settings.trainer.fast_dev_run)
        self.folder = folders.choose_folder(root, settings.name, self.checkpoint, restart, self.trial)
        if command == "fit":
            folders.hold(self.folder)
            asked = root / settings.name
            if self.folder.parent.resolve() != asked.resolve() and rank_zero_only.rank == 0:
                print(f"note: training goes on in {self.folder}, where its checkpoint is, and not in {asked}")
        everything = redact(yaml.safe_load(self._parser(command).dump(settings, skip_none=False)))
        self.plain_config = {key: value for key, value in everything.items() if key not in OF_LIGHTNINGS_VERBS}
        if "verbose" in settings:  # the command prints the metrics itself
            settings.verbose = False
        settings.trainer.default_root_dir = str(self.folder)
        folders.place_loggers(settings.trainer.logger, self.folder)

    @mistakes()
    def instantiate_classes(self) -> None:
        """Make model, data module and trainer."""
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the trainer, with the callbacks that every run has."""
        settings = self._get(self.config_init, "trainer")
        resume.leave_out_initial_weights(self.model, self.checkpoint)
        if self.subcommand == "fit" and (self.settings.speed == "auto" or self.datamodule.finds_micro_batch):
            everything = self.settings.speed == "auto"
            choose_settings(self.model, self.datamodule, settings, self.plain_config, self.folder, everything)
        callbacks = listed(settings.get("callbacks"))
        if self.subcommand == "fit":
            saving = settings.get("enable_checkpointing") is not False
            callbacks += usual_callbacks(self.model, callbacks, saving, self.folder)
        if self.subcommand == "predict":
            callbacks.append(Predictions(self.settings.predictions))
            settings["logger"] = False  # nothing is measured
        if settings.get("enable_progress_bar") is not False:
            settings["enable_progress_bar"] = add_progress_bar(callbacks)
        settings["callbacks"] = [*callbacks, RunRecord(self.plain_config, str(self.subcommand))]
        try:
            trainer = super().instantiate_trainer(**(plain(vars(settings)) | kwargs))
        except (TypeError, RuntimeError, ModuleNotFoundError) as error:
            raise Mistake(f"trainer: {str(error).splitlines()[0]}") from error
        checks.check_processes(trainer)
        return trainer

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and check what is used at once, or by no other command."""
        super().parse_arguments(parser, args)
        seed = self.settings.get("seed_everything")
        if self.verb != "predict" and any(one.partition("=")[0] == "--predictions" for one in self.arguments):
            raise Mistake(f"--predictions is what predict writes, and {self.verb} writes none: leave it out")
        if type(seed) is int and not 0 <= seed < 2**32:
            raise Mistake(f"seed_everything is {seed}: write a whole number from 0 to {2**32 - 1:,}")

    # What happens before and after each verb

    def _check(self) -> int:
        """Check the run before it starts; return the steps that its checkpoint has done."""
        command = str(self.subcommand)
        stage = "predict" if command == "export" else command if command in SPLITS else "fit"
        strict = self.subcommand == "fit" and not self.settings.force
        config = self.plain_config if strict else None
        done = checks.check(self.trainer, self.model, self.datamodule, stage, self.checkpoint, config)
        if self.checkpoint and command != "fit" and self.trainer.is_global_zero:  # fit says it after the plan
            print(f"after step {done:,}: {self.checkpoint}", flush=True)
        return done

    def before_fit(self) -> None:
        """Check, then print the plan."""
        report.plan(self.model, self.datamodule, self._check(), self.checkpoint)

    def before_validate(self) -> None:
        """Check."""
        self._check()

    before_test = before_validate

    def before_predict(self) -> None:
        """Check, also that no other file is replaced."""
        self._check()
        with mistakes():
            writes = next(callback for callback in self.trainer.callbacks if isinstance(callback, Predictions))
            writes.check(self.trainer, texts(self.plain_config.get("data")), self.settings.force)
        self.config_init["predict"]["return_predictions"] = False  # because they are written to a file

    def before_export(self) -> None:
        """Check, also that no other file is replaced."""
        path = self.settings.path
        if path and Path(path).exists() and not self.settings.force:
            raise Mistake(f"path {path} exists: write another, or --force true to replace it")
        self._check()

    def before_inspect(self) -> None:
        """Load the data alone, because a mistake in the model should not prevent a look at the data."""
        checks.load(self.trainer, self.model, self.datamodule, "fit")

    before_shards = before_inspect

    def before_sweep(self) -> None:
        """Check, and tell the trainer how to make new models. `tune` takes the rates from it."""
        self._check()
        make = self._parser(str(self.config.subcommand)).instantiate_classes
        self.trainer.recipe = recipe(make, self.settings.model, self.model, self.datamodule, self.plain_config)

    before_tune = before_sweep

    def after_fit(self) -> None:
        """Print the results, the run's folder and the next commands."""
        if self.trial:
            if self.trainer.is_global_zero:
                print("trainer.fast_dev_run: a trial, of which nothing is kept")
            return
        report.training(self.trainer, self.folder)
        report.next_commands(self.trainer, self.folder, self.arguments)
        report.look(self.trainer)

    def after_validate(self) -> None:
        """Print the metrics."""
        report.metrics(self.trainer)

    after_test = after_validate

    def after_inspect(self) -> None:
        """Write the configuration, and print the path of the picture."""
        self._conclude("inspect.png")

    def after_tune(self) -> None:
        """Write the configuration, and print the path of the findings."""
        self._conclude()

    after_sweep = after_tune

    def _conclude(self, picture: str | None = None) -> None:
        RunRecord(self.plain_config, str(self.subcommand)).setup(self.trainer, self.model, "fit")
        report.findings(self.trainer, self.folder, picture)


def verb_of(arguments: list[str]) -> str | None:
    """Return the command; None: there is none."""
    return next((argument for argument in arguments if not argument.startswith("-")), None)


def run(arguments: list[str]) -> int:
    """Run the command line; return its exit code."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    leave_out_unfounded_warnings()
    inherited = folders.FOLDER in os.environ
    before = {number: signal.getsignal(number) for number in ENDS}
    if not inherited:  # other processes end with this one
        os.environ[LEADER] = str(os.getpid())
        # The first process cleans up for all. Another one may wait for it where a handler of Python's has no turn.
        if rank_zero_only.rank == 0 and threading.current_thread() is threading.main_thread():
            for number in ENDS:
                if before[number] != signal.SIG_IGN:  # as SIGHUP is under nohup
                    signal.signal(number, _interrupt)
    try:
        with mistakes():
            check_files(arguments)
        CLI(arguments)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning ends the process with 1 after an interrupt.
        cause = stop.__context__ if isinstance(stop, SystemExit) else stop
        if not isinstance(cause, KeyboardInterrupt):
            raise
        print("error: interrupted", file=sys.stderr)
        return 128 + next((number for number in ENDS if cause.args == (number,)), signal.SIGINT)
    except Exception as error:
        if isinstance(error, Mistake) and os.environ.get("BATCHWISE_TRACEBACK"):
            raise
        folder = os.environ.get(folders.FOLDER)
        code = report.failure(error, Path(folder) if folder else None, verb_of(arguments))
        if code is None:
            raise
        return code
    finally:
        if not inherited:
            folders.forget()
            os.environ.pop(LEADER, None)
            for number, handler in before.items():
                if signal.getsignal(number) is _interrupt:
                    signal.signal(number, handler)
    return 0


def _interrupt(number: int, _: object) -> NoReturn:
    """Let SIGTERM, and a terminal that is closed, end a command as Ctrl-C does."""
    if number == signal.SIGHUP:
        write_nowhere()
    raise KeyboardInterrupt(number)
