"""The verbs of the command line that Lightning does not have, such as `inspect`, `tune` and `sweep`."""

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from batchwise.checkpoints import read_checkpoint
from batchwise.choosing import batches
from batchwise.choosing.search import USUAL
from batchwise.choosing.sweep import Recipe, sweep
from batchwise.choosing.tune import tune
from batchwise.data.module import DataModule
from batchwise.errors import mistakes
from batchwise.ranges import OpenUnitInterval, PositiveFloat, PositiveInt
from batchwise.run import publishing
from batchwise.run.exporting import SUFFIXES, Format, export
from batchwise.run.indexing import described
from batchwise.run.loading import restored
from batchwise.run.wandb import WandbLogger
from batchwise.sources.shard_writing import write_shards
from batchwise.tasks.task import Task
from batchwise.trainer import Trainer


class CommandTrainer(Trainer):
    """A trainer that also looks at batches and chooses their size. Each method is a verb of the command line."""

    recipe: Recipe | None = None
    """How `sweep` makes new models; the command line sets it."""

    def inspect(self, model: Task, datamodule: DataModule, seconds: PositiveFloat = 10.0) -> None:
        """Look at the batches without training. Print their contents and their faults, and draw a picture.

        Args:
            model: the model, which is tried on the data.
            datamodule: the data, with its plan.
            seconds: most time for reading each split. Of a larger split a random part is looked at.
        """
        if self.is_global_zero:  # one process sees the batches of all devices
            with mistakes():
                batches.inspect(self, model, datamodule, seconds)

    def export(
        self,
        model: Task,
        datamodule: DataModule,
        ckpt_path: str | None = None,
        format: Format = "torch",
        path: str | None = None,
        push: str | None = None,
    ) -> None:
        """Write one file that predicts without this project, and check it on the examples that `predict` takes.

        Args:
            model: the model of the checkpoint.
            datamodule: its data.
            ckpt_path: best, last or a file.
            format: torch: a program of torch.export; onnx: needs the extra "onnx".
            path: the file; null: model.pt2 or model.onnx in the run's folder.
            push: OWNER/NAME: also upload file, configuration and a card to the Hugging Face hub, as a private
                repository if it is new; or a folder such as ./published.
        """
        if not self.is_global_zero:
            return
        file = Path(path) if path else Path(self.default_root_dir, f"model{SUFFIXES[format]}")
        fetch, checkpoint = datamodule.split("predict"), read_checkpoint(Path(str(ckpt_path)))
        assert fetch is not None
        with mistakes():
            if push is not None:
                publishing.check(push)
            trained = restored(model, datamodule, checkpoint)
            found = export(trained.task, trained.data, fetch, file, format)
        print(f"checked on {found.examples:,} examples: the largest difference of an output is {found.difference:.1e}")
        print(f"exported: {file} ({file.stat().st_size / 2**20:,.1f} MiB)", flush=True)
        if push is not None:
            inputs = datamodule.examples("predict", 1).inputs
            config = Path(str(ckpt_path)).parent.parent / "config.yaml"
            with mistakes():
                print(f"published: {publishing.publish(file, config, checkpoint, inputs, found.outputs, push)}")

    def tune(
        self,
        model: Task,
        datamodule: DataModule,
        budget: PositiveFloat = USUAL,
        memory_gib: PositiveFloat | None = None,
    ) -> None:
        """Choose batch size and learning rate by memory, speed, gradient noise and short trainings.

        Args:
            model: the model that is to be trained; it is not changed.
            datamodule: the data, with its plan.
            budget: examples of the short trainings, as a share of those of the training, or of its first 20 epochs.
                With 0.25 they have at least 80 steps at the configured batch size, so for a small training it is more.
            memory_gib: memory that each device may use, in GiB; null: most of the free memory.
        """
        rates = self.recipe.rates if self.recipe else {}
        tune(self, model, datamodule, budget, memory_gib, rates)

    def shards(self, model: Task, datamodule: DataModule, path: str, mib: PositiveFloat = 64.0) -> None:
        """Write the examples of all splits as shards in a new folder, with their index.

        Args:
            model: is not used.
            datamodule: has the examples.
            path: the folder.
            mib: size of a shard in MiB.
        """
        if self.is_global_zero:
            with mistakes():
                print(described(write_shards(datamodule, Path(path).expanduser(), mib)), flush=True)

    def sweep(
        self,
        model: Task,
        datamodule: DataModule,
        batch_sizes: str,
        target: str,
        seeds: PositiveInt = 3,
        rates: str = "0.5,1,2",
        val_share: OpenUnitInterval = 0.05,
        results: str | None = None,
    ) -> None:
        """Train each batch size to a target, at its best learning rate. A known result is not measured again.

        Args:
            model: the model that is to be trained.
            datamodule: the data, with its plan.
            batch_sizes: batch sizes in examples, with commas between them, such as 16,64,256.
            target: a metric of validation and its value, such as val/accuracy>=0.97.
            seeds: trainings of each batch size at each rate.
            rates: factors on the rate that the rule gives. The grid grows while the best factor is at its end.
            val_share: growth of the training's length from one validation to the next; its time does not count.
            results: the file that keeps all runs; null: sweep.csv beside the folders of the runs.
        """
        runs = sweep(
            self, model, datamodule, self.recipe, results,
            batch_sizes=batch_sizes, target=target, seeds=seeds, rates=rates, val_share=val_share,
        )  # fmt: skip
        names = ("batch_size", "learning_rate", "reached", "steps", "examples", "seconds")
        for logger in self.loggers:
            for number, run in enumerate(runs):
                logger.log_metrics({f"sweep/{name}": float(getattr(run, name)) for name in names}, step=number)
            if runs and isinstance(logger, WandbLogger):
                logger.log_image("sweep/picture", [f"{self.default_root_dir}/sweep.png"])
            logger.finalize("success")


def recipe(
    instantiate: Callable[[Namespace], Namespace | dict],
    settings: Namespace,
    model: Task,
    data: DataModule,
    config: dict[str, Any],
) -> Recipe:
    """Return a maker of new models for `sweep`, and a digest of all settings that make its training differ from others.

    Args:
        instantiate: makes the objects of a configuration: `instantiate_classes` of the parser.
        settings: the configuration of the model.
        model: made from it.
        data: the data, with its plan.
        config: the configuration of the whole training, in plain types.
    """
    plain = copy.deepcopy(config)
    size = plain["data"].get("init_args", {}).pop("batch_size", None)
    reference = model._rates.scaling.reference or (data.plan and data.plan.batch_size) or size
    clipping = ("gradient_clip_val", "gradient_clip_algorithm")
    keys = ("accelerator", "precision", "channels_last", "compile", "threads", *clipping)
    settings_of_trainer = {key: plain["trainer"].get(key) for key in keys}
    if (limit := plain["trainer"].get("limit_val_batches")) is not None:
        settings_of_trainer["limit_val_batches"] = limit  # the target is of other examples
    parts = [plain["model"], reference, plain["data"], settings_of_trainer]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]

    def make(seed: int) -> Task:
        torch.manual_seed(seed)
        return instantiate(Namespace(model=copy.deepcopy(settings)))["model"]

    optimizer = plain["model"].get("init_args", plain["model"]).get("optimizer")
    arguments = optimizer.get("init_args", {}) if isinstance(optimizer, dict) else {}  # it may be another thing
    rates = {name: rate for name, rate in arguments.items() if name == "lr" or name.endswith("_lr")}
    return Recipe(make, digest, {name: rate for name, rate in rates.items() if isinstance(rate, float | int)})
