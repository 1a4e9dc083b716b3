"""The trainer of the command line: what it does besides `fit`, `validate`, `test` and `predict`."""

from batchwise.choosing import batches
from batchwise.choosing.sweep import Recipe, sweep
from batchwise.choosing.tune import tune
from batchwise.data.module import DataModule
from batchwise.errors import mistakes
from batchwise.run.wandb import WandbLogger
from batchwise.tasks.task import Task
from batchwise.trainer import Trainer


class CommandTrainer(Trainer):
    """A trainer that also looks at batches and chooses their size; the command line has a verb for each method."""

    recipe: Recipe | None = None
    """What `sweep` needs to make a model anew; the command line sets it."""

    def inspect(self, model: Task, datamodule: DataModule, seconds: float = 10.0) -> None:
        """Look at the batches without training: what is in them, what is wrong with them, a picture.

        Args:
            model: tried on the data.
            datamodule: has its plan.
            seconds: most time for reading each split; of larger ones, a random part is looked at.
        """
        if self.is_global_zero:  # one process sees the batches of all devices
            with mistakes():
                batches.inspect(self, model, datamodule, seconds)

    def tune(self, model: Task, datamodule: DataModule, steps: int = 400, memory_gib: float | None = None) -> None:
        """Choose the batch size: what fits, what is fast, what the gradient says, what follows from it.

        Args:
            model: what is to be trained; it stays as it is.
            datamodule: has its plan.
            steps: most optimizer steps of the short run from which the gradient noise scale is taken.
            memory_gib: what each device may use, in GiB; null: most of what is free.
        """
        with mistakes():
            tune(self, model, datamodule, steps, memory_gib)

    def sweep(
        self,
        model: Task,
        datamodule: DataModule,
        batch_sizes: str,
        target: str,
        seeds: int = 3,
        rates: str = "0.5,1,2",
        val_share: float = 0.05,
        results: str | None = None,
    ) -> None:
        """Train each batch size to a target, at the best learning rate of each; what is already known is not run again.

        Args:
            model: what is to be trained.
            datamodule: has its plan.
            batch_sizes: with commas between them, such as 16,64,256.
            target: a metric of validation and its value, such as val/accuracy>=0.97.
            seeds: trainings of each batch size at each rate.
            rates: factors on the rate that the rule gives. The grid grows while the best one is at its end.
            val_share: how much longer a training is from one validation to the next; its time does not count.
            results: file that keeps all runs; null: sweep.csv beside the folders of the runs.
        """
        with mistakes():
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
