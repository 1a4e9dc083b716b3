"""The base of all data modules: say where the examples are; batching, order, resume and evaluation are inherited."""

import copy
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.precision import Precision
from torch import Tensor, nn
from torch.utils.data import Dataset

from batchwise.batching.fetch import Fetch, InMemory, Request, Rows, make_fetch
from batchwise.batching.loader import EvalLoader, MicroBatch, TrainLoader, make_batch
from batchwise.batching.noise import NoiseMeter
from batchwise.batching.order import Order, Shuffled
from batchwise.batching.plan import BatchPlan
from batchwise.batching.schedule import Adaptive, BatchSizes
from batchwise.batching.tokens import SequencePlan
from batchwise.data.augment import Augmentation, augment, unit_of

Source = Sequence[Tensor | np.ndarray | Rows] | Dataset | Fetch
LIMIT_FILE = "micro_batch_limit"
SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class DataModule(pl.LightningDataModule, ABC):
    """Owns the batch. A subclass says where the examples of each split are, in `load`.

    Any two of `batch_size`, `micro_batch_size` and the trainer's `accumulate_grad_batches` give the third.

    Sequences of unequal length (a source with `lengths`, such as `Ragged`) are sorted by length within each batch,
    which changes the padding and not the batch, and may be counted in tokens.

    Args:
        batch_size: examples per optimizer step, over all devices together.
        micro_batch_size: most examples on one device at once; null: the device's whole share; auto: `fit` measures
            which fits and is fast.
        batch_tokens: tokens per optimizer step, instead of `batch_size`: an epoch is cut into batches of equally many,
            but for part of a sequence.
        micro_batch_tokens: most tokens on one device at once, padding included.
        eval_batch_size: most examples on one device at once in evaluation; null: as in training, at least 256.
        order: the order of the training examples.
        drop_last: leave out the short batch at the end of an epoch. It is trained on, exactly, by default.
        num_workers: processes per device that read a map-style data set; tensors need none.
        max_unreadable: examples of a map-style data set that may turn out unreadable and are left out of training.
        batch_size_schedule: how the batch size changes in the course of the training, which begins with `batch_size`.
        seed: of the order; null: that of `seed_everything`.
        resident_share: the data is held on a GPU where each split takes at most this share of its free memory.
        augment: what is done to training inputs, in order: from batchwise.data.augment or mixing, or any module.
    """

    def __init__(
        self,
        batch_size: int | None = None,
        micro_batch_size: int | Literal["auto"] | None = None,
        batch_tokens: int | None = None,
        micro_batch_tokens: int | None = None,
        eval_batch_size: int | None = None,
        order: Order | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        max_unreadable: int = 0,
        batch_size_schedule: BatchSizes | None = None,
        seed: int | None = None,
        resident_share: float = 0.25,
        augment: list[Augmentation | nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.finds_micro_batch = micro_batch_size == "auto"
        micro_batch_size = None if micro_batch_size == "auto" else micro_batch_size
        sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size, "eval_batch_size": eval_batch_size}
        for name, value in (sizes | {"batch_tokens": batch_tokens, "micro_batch_tokens": micro_batch_tokens}).items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name} is {value}: write a whole number of at least 1")
        if batch_size is not None and batch_tokens is not None:
            raise ValueError(f"data.batch_size is {batch_size} and data.batch_tokens {batch_tokens}: write one of them")
        if num_workers < 0:
            raise ValueError(f"data.num_workers is {num_workers}: write 0 or a number of processes")
        if not 0 <= resident_share <= 1:
            raise ValueError(f"data.resident_share is {resident_share}: write a share from 0 to 1")
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.batch_tokens = batch_tokens
        self.micro_batch_tokens = micro_batch_tokens
        self.eval_batch_size = eval_batch_size
        self.order = Shuffled() if order is None else order
        self.drop_last = drop_last
        self.num_workers = num_workers
        self.max_unreadable = max_unreadable
        self.batch_size_schedule = BatchSizes() if batch_size_schedule is None else batch_size_schedule
        self.seed = seed
        self.resident_share = resident_share
        self.augment = augment or []
        self.unit = 1
        """Examples that the network needs together."""
        self.plan: BatchPlan | None = None
        self._plan_at_first: BatchPlan | None = None
        self._splits: dict[str, Fetch | None] = {}
        self._fed: dict[str, Fetch] = {}
        self._loader: TrainLoader | None = None
        self._restored_step = 0
        self.micro_batch_limit: int | None = None
        """Most examples that were found to fit at once."""
        self._left_limit: int | None = None

    # What a subclass writes

    @abstractmethod
    def load(self, split: str) -> Source | None:
        """Return the examples of a split: tensors or arrays (inputs, targets), or a map-style data set.

        Args:
            split: "train", "val", "test" or "predict" (by default the same as "test").
        """

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        """Return the batch as the network takes it. Runs on the device, so small types (uint8) can travel there."""
        return batch

    class_names: list[str] | None = None
    """Names of the classes, in the order of their numbers, where they have any: `predict` writes them."""

    def describe(self, index: Tensor) -> dict[str, list]:
        """Return what `predict` writes of examples of its split besides their numbers: columns [N] by name."""
        return {}

    def check(self, network: nn.Module) -> None:
        """Raise ValueError where the network does not suit the data; before it is tried on it."""

    # What is inherited

    @property
    def replicas(self) -> tuple[int, int]:
        """The number of devices, which is the number of shares of a batch; and which of them this process is."""
        if self.trainer is None:
            return 1, 0
        size = getattr(self.trainer.strategy, "_tensor_parallel_size", 1)
        if size != 1:
            raise ValueError(f"trainer.strategy.tensor_parallel_size is {size}: write 1, because layers are not cut")
        return self.trainer.world_size, self.trainer.global_rank

    def split(self, name: str) -> Fetch | None:
        """Return the examples of a split, loaded once."""
        if name not in self._splits:
            source = self.load("test" if name == "predict" and not self._knows_predict else name)
            self._splits[name] = None if source is None else make_fetch(source, self.num_workers, self.max_unreadable)
        return self._splits[name]

    _knows_predict = False
    """Set to True where `load` has a "predict" split of its own."""

    @property
    def limit_file(self) -> Path:
        """Where a run on several devices leaves the micro-batch size with which a restart may fit into memory."""
        return Path(self.trainer.default_root_dir if self.trainer else ".") / LIMIT_FILE

    def _read_limit(self) -> int | None:
        return int(self.limit_file.read_text()) if self.limit_file.exists() else None

    def ran_out_of_memory(self) -> bool:
        """Return whether a process of this run has left a limit, and not one of an earlier run."""
        return self._read_limit() != self._left_limit

    def loaded(self) -> list[tuple[str, Fetch]]:
        """Return the splits loaded so far, by name."""
        return [(name, fetch) for name, fetch in self._splits.items() if fetch is not None]

    def setup(self, stage: str) -> None:
        """Load the splits that `stage` needs and, for `fit`, make the plan. Calling it again costs nothing."""
        for name in SPLITS[stage]:
            fetch = self.split(name)
            if fetch is not None and len(fetch) == 0:
                raise ValueError(f"the {name} split has no examples: check where it is read from")
            devices, _ = self.replicas
            if fetch is not None and name != "train" and len(fetch) < devices:
                raise ValueError(f"the {name} split has {len(fetch)} examples: use at most {len(fetch)} devices")
            if fetch is None and name != "val":
                raise ValueError(f"{type(self).__name__}.load('{name}') gave nothing: this command needs that split")
        if stage == "fit" and self.plan is None:
            self._make_plan()

    def _make_plan(self) -> None:
        train = self.split("train")
        assert train is not None
        trainer = self.trainer
        if self.seed is None:
            self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        sizes: dict[str, Any] = {
            "batch_size": self.batch_size,
            "micro_batch_size": self.micro_batch_size,
            "accumulate_grad_batches": getattr(trainer, "accumulation", None),
            "devices": self.replicas[0],
            "unit": self.together(getattr(getattr(trainer, "lightning_module", None), "unit", self.unit)),
        }
        self._left_limit = self._read_limit()
        if self._left_limit is not None:
            sizes["micro_batch_size"] = min(self.micro_batch_size or self._left_limit, self._left_limit)
            sizes["accumulate_grad_batches"] = None
        lengths = getattr(train, "lengths", None)
        if self.batch_tokens or self.micro_batch_tokens:
            sizes["batch_size"] = self._size_of_tokens(lengths, sizes)
        batch_size = BatchPlan.derive(examples=len(train), **sizes).batch_size
        # Batches of all sizes are whole numbers of those that the order makes.
        deal = math.gcd(batch_size, *self.batch_size_schedule.sizes)
        self.order.prepare(len(train), deal, self.seed, self.labels(), lengths)
        plan = BatchPlan.derive(examples=len(self.order), drop_last=self.drop_last, **sizes)
        if lengths is not None:
            tokens = {"batch_tokens": self.batch_tokens, "micro_batch_tokens": self.micro_batch_tokens}
            plan = SequencePlan.of(plan, lengths, self.order, **tokens)
        if trainer is not None:
            limit = trainer.limit_train_batches
            plan = replace(plan, limit=max(1, int(plan.steps_per_epoch * limit)) if isinstance(limit, float) else limit)
            trainer.limit_train_batches = 1.0  # of what is left: Lightning would take the share once more
        self.plan = self._plan_at_first = self._with_changes(plan)
        if self.plan.batch_size > self.plan.examples and (trainer is None or trainer.is_global_zero):
            warnings.warn(
                f"data.batch_size is {plan.batch_size}, but there are only {self.plan.examples} examples: every step "
                "trains on all of them",
                stacklevel=2,
            )

    def _with_changes(self, plan: BatchPlan) -> BatchPlan:
        """Return the plan with the changes of batch size that are known before training."""
        trainer, schedule = self.trainer, self.batch_size_schedule
        epochs = trainer.max_epochs if trainer else None
        total = math.inf if epochs in (None, -1) else epochs * plan.examples_per_epoch
        plan = replace(plan, changes=schedule.changes(total))
        if isinstance(schedule, Adaptive) and self._noise_meter() is None:
            raise ValueError(
                "data.batch_size_schedule Adaptive follows the gradient noise scale, but nobody measures it: write "
                "batchwise.callbacks.noise_scale.NoiseScale under trainer.callbacks"
            )
        if trainer is not None and (plan.changes or isinstance(schedule, Adaptive)):
            # Epochs differ in length, for which Lightning asks again only where it asks for a new loader.
            trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        return plan

    def _noise_meter(self) -> NoiseMeter | None:
        callbacks = self.trainer.callbacks if self.trainer else []  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, NoiseMeter)), None)

    def _adapt(self, schedule: Adaptive) -> None:
        """Decide on the batch size of the epoch that begins, if one does and its size is not decided."""
        plan, step, noise = self.plan, self.position(), self._noise_meter()
        assert plan is not None
        seen, size = plan.examples_at(step), plan.size_at(step)
        estimate = noise.estimate() if noise else None
        if estimate is None or not plan.begins_epoch(step) or (plan.changes and plan.changes[-1][0] == seen):
            return
        measured = estimate.low if estimate.lost else estimate.scale
        size = schedule.next(size, plan.batch_size, min(schedule.most, plan.positions), measured)
        size = self.trainer.strategy.broadcast(size) if self.trainer else size  # so that no rounding parts the devices
        if size != plan.size_at(step):
            self.plan = replace(plan, changes=(*plan.changes, (seen, size)))

    def _size_of_tokens(self, lengths: Tensor | None, sizes: dict[str, Any]) -> int | None:
        """Return the number of examples that `batch_tokens` are on average, or `batch_size` where that is given."""
        if lengths is None:
            raise ValueError(
                "data.batch_tokens and data.micro_batch_tokens are of sequences, but the training split has no "
                "lengths: write data.batch_size and data.micro_batch_size"
            )
        if self.batch_tokens is None:
            return self.batch_size
        if sizes["accumulate_grad_batches"] is not None:
            raise ValueError(
                f"trainer.accumulate_grad_batches is {sizes['accumulate_grad_batches']}, but data.batch_tokens is cut "
                "by tokens: write data.micro_batch_tokens"
            )
        return max(1, round(self.batch_tokens * len(lengths) / max(1, int(lengths.sum()))))

    def together(self, unit: int) -> int:
        """Return how many examples must stay together, where the network needs `unit` and augmentations need theirs."""
        return math.lcm(unit, unit_of(self.augment, self.order))

    def resized(self, batch_size: int, micro_batch_size: int | None) -> "DataModule":
        """Return a copy with other sizes, that shares the data."""
        other = copy.copy(self)
        other.batch_size, other.micro_batch_size = batch_size, micro_batch_size
        other.batch_tokens = other.micro_batch_tokens = None
        other.order, other.plan, other._plan_at_first, other.trainer = copy.copy(self.order), None, None, None
        other.batch_size_schedule = BatchSizes()
        other._loader, other._restored_step = None, 0
        return other

    def examples(self, name: str, count: int) -> MicroBatch:
        """Return the first examples of a split as a batch on the host, as they are before `transform`."""
        fetch = self.split(name)
        assert fetch is not None
        index = torch.arange(min(count, len(fetch)))
        fields, _ = next(iter(fetch.stream([Request.one(index)])))
        return make_batch(fields, index)

    def labels(self) -> Tensor | None:
        """Return the training targets [examples] where they are whole numbers in memory (some orders need them)."""
        fields = getattr(self.split("train"), "fields", ())
        target = fields[-1] if len(fields) > 1 else None
        return target if target is not None and target.ndim == 1 and not target.is_floating_point() else None

    def train_dataloader(self) -> TrainLoader:
        """Return the loader that yields one `Batch` per optimizer step."""
        assert self.plan is not None
        if isinstance(self.batch_size_schedule, Adaptive):
            self._adapt(self.batch_size_schedule)
        _, rank = self.replicas
        waited = self.waited
        self._loader = TrainLoader(self.plan, self.order, self.feed("train"), rank, self.position)
        self._loader.waited = waited
        return self._loader

    @property
    def waited(self) -> float:
        """Seconds so far in which training waited for examples."""
        return self._loader.waited if self._loader else 0.0

    def feed(self, name: str) -> Fetch:
        """Return the way in which the examples of a split reach the device."""
        if name not in self._fed:
            fetch = self.split(name)
            assert fetch is not None
            if isinstance(fetch, InMemory) and self.trainer is not None:
                fetch = fetch.on(self.trainer.strategy.root_device, self.resident_share)
            self._fed[name] = fetch
        return self._fed[name]

    def val_dataloader(self) -> EvalLoader | list:
        """Return this device's shard of the validation split."""
        return self._eval_loader("val")

    def test_dataloader(self) -> EvalLoader | list:
        """Return this device's shard of the test split."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> EvalLoader | list:
        """Return this device's shard of the predict split."""
        return self._eval_loader("predict")

    def _eval_loader(self, name: str) -> EvalLoader | list:
        if self.split(name) is None:
            return []
        size = self.eval_batch_size
        if size is None and self.micro_batch_tokens:
            lengths = getattr(self.split(name), "lengths", torch.ones(1))
            size = max(1, self.micro_batch_tokens // max(1, int(lengths.max())))
        size = size or max(256, self.plan.largest_micro_batch if self.plan else 0)
        devices, rank = self.replicas
        return EvalLoader(self.feed(name), size, rank, devices)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave batches on the host: the task takes each with `to_device`, inside the precision's context."""
        return batch

    def to_device(self, batch: MicroBatch, device: torch.device, training: bool) -> MicroBatch:
        """Return one micro-batch on the device, in the trainer's precision, transformed; in training, augmented."""
        convert = self.trainer.precision_plugin.convert_input if self.trainer else None
        if getattr(convert, "__func__", None) is Precision.convert_input:
            convert = None  # it would do nothing, to each tensor
        batch = batch.to(device, convert)
        if not training or not self.augment:
            return self.transform(batch, training)
        batch = augment(batch, self.augment, False, self.seed or 0, self.order)
        return augment(self.transform(batch, training), self.augment, True, self.seed or 0, self.order)

    # The position in training is the number of optimizer steps done, and nothing else

    def position(self) -> int:
        """Return the number of optimizer steps done."""
        return max(self._restored_step, self.trainer.global_step if self.trainer else 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the changes of batch size, and a fingerprint of all that decides what a batch is."""
        return {
            "step": self.position(),
            "changes": [list(change) for change in self.plan.changes] if self.plan else [],
            "fingerprint": self.fingerprint(),
            "micro_batch_limit": self.micro_batch_limit,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position, and what was decided on the way."""
        self._restored_step = state_dict["step"]
        if isinstance(self.batch_size_schedule, Adaptive) and self.plan is not None:
            self.plan = replace(self.plan, changes=tuple((seen, size) for seen, size in state_dict["changes"]))
        self.micro_batch_limit = state_dict["micro_batch_limit"]

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides which examples form a batch; it must be the same when training is resumed."""
        if self.plan is None or self._plan_at_first is None:
            return {}
        some: dict[str, Any] = {}
        if changes := self._plan_at_first.changes:  # and not what was decided on the way
            some["changes"] = [list(change) for change in changes]
        if isinstance(self.plan, SequencePlan):
            some["tokens"] = int(self.plan.lengths.sum())
        return some | {
            "examples": self.plan.examples,
            "batch_size": self.plan.batch_size,
            "steps_per_epoch": self.plan.steps_per_epoch,
            "seed": self.seed,
            "order": type(self.order).__name__,
        }

    def total_examples(self) -> float:
        """Return the number of examples that the trainer's limits allow, as it is known before training."""
        assert self._plan_at_first is not None
        steps = self.total_steps()
        return steps if steps == math.inf else self._plan_at_first.examples_at(int(steps))

    def total_steps(self) -> float:
        """Return the number of optimizer steps that the trainer's limits allow (inf: none), as it is known before."""
        plan = self._plan_at_first
        assert plan is not None
        assert self.trainer is not None
        max_epochs, max_steps = self.trainer.max_epochs, self.trainer.max_steps
        by_epochs = math.inf if max_epochs in (None, -1) else plan.first_step(max_epochs)
        return min(by_epochs, math.inf if max_steps == -1 else max_steps)
