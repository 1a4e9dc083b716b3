"""The base of all data modules. It defines the batch, and a subclass loads the examples."""

import math
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, final

import lightning.pytorch as pl
import torch
from torch import nn

from batchwise.arguments import typed
from batchwise.batching.loader import EvalLoader, TrainLoader
from batchwise.batching.order import Order
from batchwise.batching.plan import BatchPlan
from batchwise.batching.schedule import Adaptive, BatchSizes
from batchwise.batching.tokens import SequencePlan
from batchwise.data.augment import Augmentation, unit_of
from batchwise.data.learnt import Learning
from batchwise.data.planning import EVAL_BATCH, LimitedLoader, adapted, check_trainer, eval_loader, make_plan
from batchwise.ranges import ClosedUnitInterval, NonNegativeInt, PositiveInt

LIMIT_FILE = "micro_batch_limit"


class DataModule(Learning):
    """Owns the batch. A subclass loads the examples of each split, in `load`.

    A subclass writes `load` and, if it likes, `transform`, `learn`, `class_names`, `has_predict_split`, `describe`,
    `check`, `labels` and `sources`. It may call `learnt`, `split`, `examples`, `to_device`, `plan`, `position`,
    `total_steps` and `total_examples`. Besides the methods of this class and the arguments below, all names are free
    for its own use.

    Any two of `batch_size`, `micro_batch_size` and the trainer's `accumulate_grad_batches` give the third.

    Sequences of unequal length (a source with `lengths`, such as `Ragged`) are sorted by length within each batch. This
    changes the padding and not the batch. Batches of sequences may be counted in tokens.

    Args:
        batch_size: examples per optimizer step, over all devices together.
        micro_batch_size: most examples on one device at once; null: the device's whole share; auto: `fit` measures
            which size fits and is fast.
        batch_tokens: tokens per optimizer step, instead of `batch_size`. An epoch is cut into batches of equally many
            tokens, up to part of a sequence.
        micro_batch_tokens: most tokens on one device at once, padding included.
        eval_batch_size: most examples on one device at once in evaluation; null: as in training, at least 256.
        order: the order of the training examples.
        drop_last: leave out the short batch at the end of an epoch. It is trained on, exactly, by default.
        num_workers: processes per device that read a map-style data set; tensors need none.
        max_unreadable: the most examples of a map-style data set that may be unreadable. They are left out of training.
        batch_size_schedule: changes of the batch size during training, which begins with `batch_size`.
        seed: seed of the order; null: that of `seed_everything`.
        resident_share: a split is held on a GPU if it takes at most this share of the GPU's free memory.
        augment: augmentations of the training inputs, in order: from batchwise.data.augment or mixing, or any module.
    """

    @typed
    def __init__(
        self,
        batch_size: PositiveInt | None = None,
        micro_batch_size: PositiveInt | Literal["auto"] | None = None,
        batch_tokens: PositiveInt | None = None,
        micro_batch_tokens: PositiveInt | None = None,
        eval_batch_size: PositiveInt | None = None,
        order: Order | None = None,
        drop_last: bool = False,
        num_workers: NonNegativeInt = 0,
        max_unreadable: NonNegativeInt = 0,
        batch_size_schedule: BatchSizes | None = None,
        seed: int | None = None,
        resident_share: ClosedUnitInterval = 0.25,
        augment: list[Augmentation | nn.Module] | None = None,
    ) -> None:
        super().__init__(order, seed, num_workers, max_unreadable, resident_share, augment)
        self.__finds_micro_batch = micro_batch_size == "auto"
        if batch_size is not None and batch_tokens is not None:
            raise ValueError(f"data.batch_size is {batch_size} and data.batch_tokens {batch_tokens}: write one of them")
        self.batch_size = batch_size
        self.micro_batch_size = None if micro_batch_size == "auto" else micro_batch_size
        self.batch_tokens = batch_tokens
        self.micro_batch_tokens = micro_batch_tokens
        self.eval_batch_size = eval_batch_size
        self.drop_last = drop_last
        self.batch_size_schedule = BatchSizes() if batch_size_schedule is None else batch_size_schedule
        self.attach(None)

    @property
    @final
    def plan(self) -> BatchPlan | None:
        """How each batch is cut into shares and micro-batches; None before `setup("fit")`."""
        return self.__plan

    @property
    @final
    def finds_micro_batch(self) -> bool:
        """Whether `fit` measures which micro-batch size fits and is fast."""
        return self.__finds_micro_batch

    @property
    @final
    def micro_batch_limit(self) -> int | None:
        """Most examples that were found to fit at once; None: no limit was found."""
        return self.__limit

    @micro_batch_limit.setter
    def micro_batch_limit(self, limit: int | None) -> None:
        self.__limit = limit

    @property
    @final
    def limit_file(self) -> Path:
        """The file where a run on several devices leaves a micro-batch size that may fit into memory on a restart."""
        return Path(self.trainer.default_root_dir if self.trainer else ".") / LIMIT_FILE

    def __read_limit(self) -> int | None:
        return int(self.limit_file.read_text()) if self.limit_file.exists() else None

    @final
    def ran_out_of_memory(self) -> bool:
        """Return whether a process of this run has left a limit, and not one of an earlier run."""
        return self.__read_limit() != self.__left_limit

    @final
    def attach(self, trainer: pl.Trainer | None, unit: int = 1) -> None:
        """Forget the plan and the position, and take a new trainer. `setup` and the command line call this.

        Args:
            trainer: has the devices and the limits.
            unit: examples that the network needs together.
        """
        self.trainer = self.__trainer = trainer
        self.__unit = unit
        self.__plan: BatchPlan | None = None
        self.__first_plan: BatchPlan | None = None  # without changes that are decided in training
        self.__loader: TrainLoader | None = None
        self.__restored_step = 0
        self.__limit: int | None = None
        self.__left_limit: int | None = None  # of an earlier run

    def setup(self, stage: str) -> None:
        """Load the splits that `stage` needs and, for `fit`, make the plan. Calling it again costs nothing."""
        if self.__trainer is not self.trainer:
            self.attach(self.trainer)
        check_trainer(self.trainer)
        self.check_recalled(training=stage == "fit" and not self._lenient)
        super().setup(stage)
        self.check_division("val" if stage in ("fit", "validate") else "test")
        if stage == "fit" and self.plan is None:
            self.__make_plan()

    def __make_plan(self) -> None:
        train, trainer, schedule = self.split("train"), self.trainer, self.batch_size_schedule
        task: Any = getattr(trainer, "lightning_module", None)
        assert train is not None
        if self.seed is None:
            self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        micro_batch_size, accumulation = self.micro_batch_size, getattr(trainer, "accumulation", None)
        limit = self.__left_limit = self.__read_limit()
        if limit is not None:
            micro_batch_size, accumulation = min(micro_batch_size or limit, limit), None
        self.__plan = self.__first_plan = plan = make_plan(
            self.order,
            schedule,
            trainer,
            seed=self.seed,
            examples=len(train),
            labels=self.labels(),
            lengths=getattr(train, "lengths", None),
            sources=self.sources(),
            shards=getattr(train, "shards", None),
            batch_size=self.batch_size,
            micro_batch_size=micro_batch_size,
            batch_tokens=self.batch_tokens,
            micro_batch_tokens=self.micro_batch_tokens,
            accumulate_grad_batches=accumulation,
            drop_last=self.drop_last,
            devices=self.replicas[0],
            unit=self.unit_for(task._step.unit if hasattr(task, "_step") else self.__unit),
        )
        if trainer is not None and (plan.changes or isinstance(schedule, Adaptive)):
            # Epochs differ in length, and Lightning asks for the length only when it asks for a new loader.
            trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        if plan.batch_size > plan.examples and (trainer is None or trainer.is_global_zero):
            warnings.warn(
                f"data.batch_size is {plan.batch_size}, but an epoch has only {plan.examples} examples: each epoch is "
                "one step",
                stacklevel=2,
            )

    @final
    def unit_for(self, unit: int) -> int:
        """Return the examples that must stay together, for a network that needs `unit` and for the augmentations."""
        return math.lcm(unit, unit_of(self.augment, self.order))

    @property
    @final
    def waited(self) -> float:
        """Seconds so far in which training waited for examples."""
        return self.__loader.waited if self.__loader else 0.0

    @final
    def train_dataloader(self) -> TrainLoader:
        """Return the loader that yields one `Batch` per optimizer step."""
        plan, schedule = self.__plan, self.batch_size_schedule
        assert plan is not None
        if isinstance(schedule, Adaptive):
            plan = self.__plan = adapted(plan, schedule, self.position(), self.trainer)
        loader = LimitedLoader(plan, self.order, self.feed("train"), self.replicas[1], self.position)
        loader.limit, loader.waited = self.trainer and self.trainer.limit_train_batches, self.waited
        self.__loader = loader
        return loader

    @final
    def val_dataloader(self) -> EvalLoader | list:
        """Return this device's shard of the validation split."""
        return self.__eval_loader("val")

    @final
    def test_dataloader(self) -> EvalLoader | list:
        """Return this device's shard of the test split."""
        return self.__eval_loader("test")

    @final
    def predict_dataloader(self) -> EvalLoader | list:
        """Return this device's shard of the predict split."""
        return self.__eval_loader("predict")

    def __eval_loader(self, name: str) -> EvalLoader | list:
        if self.split(name) is None:
            return []
        size = self.eval_batch_size
        if size is None and self.micro_batch_tokens:
            lengths = getattr(self.split(name), "lengths", torch.ones(1))
            size = max(1, self.micro_batch_tokens // max(1, int(lengths.max())))
        size = size or max(EVAL_BATCH, self.plan.largest_micro_batch if self.plan else 0)
        limit = self.trainer and getattr(self.trainer, f"limit_{name}_batches")
        return eval_loader(name, self.feed(name), size, self.eval_batch_size, self.replicas, limit)

    # The position in training is the number of optimizer steps done, and nothing else

    @final
    def position(self) -> int:
        """Return the number of optimizer steps done."""
        return max(self.__restored_step, self.trainer.global_step if self.trainer else 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: what a resume takes from it, and what must not differ."""
        return super().state_dict() | {
            "step": self.position(),
            "changes": [list(change) for change in self.plan.changes] if self.plan else [],
            "fingerprint": self.fingerprint(),
            "contents": self.contents(),
            "micro_batch_limit": self.micro_batch_limit,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position, the limit and the changes of batch size."""
        if not self.recalled:  # a checkpoint that is no local file is read too late
            self.recall(state_dict)
            self.check_recalled(training=True)
        self.__restored_step, self.__limit = state_dict["step"], state_dict["micro_batch_limit"]
        if isinstance(self.batch_size_schedule, Adaptive) and self.__plan is not None:
            self.__plan = replace(self.__plan, changes=tuple((seen, size) for seen, size in state_dict["changes"]))

    @final
    def fingerprint(self) -> dict[str, Any]:
        """Return all that decides which examples form a batch. It must be the same when training is resumed."""
        plan = self.__first_plan
        if plan is None:
            return {}
        changes = {"changes": [list(change) for change in plan.changes]} if plan.changes else {}
        tokens = {"tokens": int(plan.lengths.sum())} if isinstance(plan, SequencePlan) else {}
        sizes = {name: getattr(plan, name) for name in ("examples", "batch_size", "steps_per_epoch")}
        return {**changes, **tokens, **sizes, "seed": self.seed, "order": str(self.order)}

    @final
    def total_steps(self) -> float:
        """Return the optimizer steps that the trainer's limits allow (inf: no limit), as known before training."""
        plan, trainer = self.__first_plan, self.trainer
        assert plan is not None
        assert trainer is not None
        epochs, steps = trainer.max_epochs, trainer.max_steps
        by_epochs = math.inf if epochs in (None, -1) else plan.first_step(epochs)
        return min(by_epochs, math.inf if steps == -1 else steps)

    @final
    def total_examples(self) -> float:
        """Return the examples that the trainer's limits allow (inf: no limit), as known before training."""
        steps, plan = self.total_steps(), self.__first_plan
        return steps if steps == math.inf or plan is None else plan.examples_at(int(steps))
