"""Lightning's Trainer, with the defaults that an exact global batch needs."""

from contextlib import nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy

from project import host
from project.callbacks.durable import DurableIO
from project.choosing import batches
from project.choosing.sweep import Recipe, sweep
from project.choosing.tune import tune
from project.data.module import DataModule
from project.errors import mistakes
from project.logger import WandbLogger
from project.tasks.task import Task


class Unprofiled(PassThroughProfiler):
    """Measures nothing, and costs less than Lightning's: it is asked 40 times per step."""

    def profile(self, action_name: str) -> Any:
        """Return a context that does nothing."""
        return _NOTHING


_NOTHING = nullcontext()


class Trainer(pl.Trainer):
    """Lightning's Trainer. One loader item is one global batch, so Lightning itself never accumulates.

    Args:
        accumulate_grad_batches: micro-batches per device and optimizer step; null: derived from `data.batch_size` and
            `data.micro_batch_size`. It never changes the batch.
        log_every_n_steps: optimizer steps between two rows in the log.
        num_sanity_val_steps: validation batches before training. The first examples are tried on the network anyway.
        enable_model_summary: print a table of the network's layers.
        use_distributed_sampler: must stay false: the data module cuts the batches.
        plugins: as in Lightning; checkpoints are written durably unless one of these is a checkpoint writer.
        profiler: "simple", "advanced" or "pytorch", to see where the time goes.
        channels_last: lay images out with the channels last, which convolutions like better on GPUs and with bf16.
            Null, here and below, is no, but leaves it to `speed: auto`.
        compile: compile the network (`torch.compile`); the first steps take up to minutes.
        matmul_precision: of products of float32 matrices: highest; high (TF32, faster on recent GPUs) or medium
            (bfloat16); null: as PyTorch has it.
        threads: of PyTorch on the CPU, per process; null: the processes of a machine share its cores.
        keep_memory: on a CPU, keep freed memory for the next step: faster where a micro-batch needs much.
        **kwargs: those of Lightning's Trainer.
    """

    recipe: Recipe | None = None
    """What `sweep` needs to make a model anew; the command line sets it."""

    def __init__(
        self,
        *,
        accumulate_grad_batches: int | None = None,
        log_every_n_steps: int = 10,
        num_sanity_val_steps: int = 0,
        enable_model_summary: bool = False,
        use_distributed_sampler: bool = False,
        plugins: Any = None,
        profiler: Profiler | str | None = None,
        channels_last: bool | None = None,
        compile: bool | None = None,
        matmul_precision: Literal["highest", "high", "medium"] | None = None,
        threads: int | None = None,
        keep_memory: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if use_distributed_sampler:
            raise ValueError("trainer.use_distributed_sampler is true: leave it out, the data module cuts the batches")
        if accumulate_grad_batches is not None and accumulate_grad_batches < 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches is {accumulate_grad_batches}: write a whole number of at least 1"
            )
        if threads is not None and threads < 1:
            raise ValueError(f"trainer.threads is {threads}: write a whole number of at least 1")
        self.accumulation = accumulate_grad_batches
        self.channels_last, self.compile = bool(channels_last), bool(compile)
        if matmul_precision is not None:
            torch.set_float32_matmul_precision(matmul_precision)
        if threads is not None:
            host.set_threads(threads)
        if keep_memory and not host.keep_memory(True):
            print("trainer.keep_memory is true, but this C library cannot: training goes on without", flush=True)
        plugins = [] if plugins is None else list(plugins) if isinstance(plugins, list | tuple) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(DurableIO())
        super().__init__(
            accumulate_grad_batches=1,
            log_every_n_steps=log_every_n_steps,
            num_sanity_val_steps=num_sanity_val_steps,
            enable_model_summary=enable_model_summary,
            use_distributed_sampler=False,
            plugins=plugins,
            profiler=Unprofiled() if profiler is None else profiler,
            **kwargs,
        )
        if isinstance(self.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise ValueError(
                f"trainer.strategy is {type(self.strategy).__name__}, which keeps gradients where the exact step does "
                "not see them: write ddp, or take configs/overlays/fsdp.yaml"
            )
        if isinstance(self.strategy, DDPStrategy):
            # Each device computes the same running statistics, or none. Copying those of the first device over the
            # others before every forward pass is a cost, and would undo exact ones. Lightning has no setter for it.
            self.strategy._ddp_kwargs.setdefault("broadcast_buffers", False)

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
