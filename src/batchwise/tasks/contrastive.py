"""Losses that couple the examples of a batch, exact over the whole global batch in any micro-batches.

By gradient caching (Gao et al. 2021, arXiv 2101.06983):

1. All micro-batches go forward without a graph. Their embeddings are put at their positions in the global batch, over
   all devices.
2. The loss of the whole batch is computed from these, and its gradient with respect to each embedding.
3. Each micro-batch goes forward again, with its graph, and that gradient goes backward through it.

Random numbers are keyed by seed, step and example, or the generator is seeded by them. So the second pass draws what
the first one drew. A batch that is one micro-batch on one device needs no first pass.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from batchwise.arguments import typed
from batchwise.batching.gradients import Number, weighted_sum
from batchwise.batching.loader import Batch, MicroBatch
from batchwise.data.module import DataModule
from batchwise.data.planning import noise_meter
from batchwise.errors import TrainingStopped
from batchwise.models import place
from batchwise.models.kept import kept_buffers
from batchwise.ranges import PositiveInt
from batchwise.tasks.coupled import CoupledLoss, Pairs, retrieved
from batchwise.tasks.groups import Ahead, Groups, checked, join, present, refuse_lists, spread
from batchwise.tasks.memory import is_out_of_memory
from batchwise.tasks.passes import begin
from batchwise.tasks.rehearsal import on_device
from batchwise.tasks.sums import reduce
from batchwise.tasks.task import Task
from batchwise.tasks.trying import outputs_of


class Contrastive(Task):
    """Learn embeddings by comparing the examples of a batch with one another.

    A subclass may write `embed` and `pair_losses`. Without `embed`, the network maps inputs to embeddings [N, D]; each
    of several inputs is embedded by itself. Losses are over the whole global batch, and so is their gradient, in any
    micro-batches, on any devices.

    Evaluation is over groups of consecutive examples of a split, which do not depend on devices or `eval_batch_size`.

    Args:
        network: makes the embeddings.
        loss: of the embeddings of a batch; null: write `pair_losses`.
        group_size: most examples of an evaluation that are compared with one another; sizes differ by at most one.
            Null: the batch size. More make retrieval harder, so fix it in order to compare batch sizes.
        **kwargs: those of `Task`.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/top1", "max")
    _couples: ClassVar[bool] = True

    @typed
    def __init__(
        self,
        network: nn.Module,
        loss: CoupledLoss | None = None,
        group_size: PositiveInt | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        if loss is None and type(self).pair_losses is Contrastive.pair_losses:
            raise ValueError("model.loss is not set: write one of batchwise.tasks.coupled, such as InfoNCE")
        self.loss, self.group_size = loss, group_size
        self._ahead: Ahead | None = None
        self._groups: Groups | None = None
        self._compares = True
        """Whether evaluation gives as many embeddings of an example as the loss compares."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "losses" in vars(cls):
            raise TypeError(f"{cls.__name__}.losses sees one micro-batch: write embed, and pair_losses")

    # What a subclass may write

    def embed(self, batch: MicroBatch) -> Tensor | tuple[Tensor, ...]:
        """Return the embeddings of a micro-batch, [N, D], or a tuple of such, such as of image and text."""
        inputs = batch.inputs
        return tuple(self(each) for each in inputs) if isinstance(inputs, tuple) else self(inputs)

    def pair_losses(self, embeddings: tuple[Tensor, ...], targets: Any) -> Pairs:
        """Return one loss per example of the whole batch, [B], never averaged; or losses and weights, [B] each.

        Args:
            embeddings: what `embed` gives, [B, D] each, in single precision at least. Examples that cannot be read are
                not among them.
            targets: of the same examples.
        """
        assert self.loss is not None
        return self.loss(embeddings, targets)

    def answers(self, embeddings: tuple[Tensor, ...], targets: Any) -> tuple[Tensor, Tensor]:
        """Return whether retrieval finds the right one, from 0 to 1, and the weight of it, [B]: see `retrieved`."""
        if self.loss is None:
            return retrieved(embeddings, targets)
        return retrieved(embeddings, targets, self.loss.by_target, self.loss.similarity)

    def predictions(self, batch: MicroBatch) -> dict[str, Tensor]:
        """The embeddings [N, D]; of several, each by its number."""
        embeddings = self._outputs(batch).inputs
        if len(embeddings) == 1:
            return {"embedding": embeddings[0]}
        return {f"embedding{number}": each for number, each in enumerate(embeddings)}

    def make_metrics(self, outputs: Any) -> MetricCollection:
        """The share of examples for which retrieval finds a right one first: within the batch, or the group."""
        return MetricCollection({"top1": MeanMetric()})

    def check(self, data: DataModule, outputs: Any) -> None:
        """Refuse a loss that needs more embeddings than there are, and what cannot work with coupled examples."""
        name, trainer = type(self).__name__, data.trainer
        self._compares = len(outputs.inputs) >= self._views
        if self.group_size is None and data.batch_size is None:
            raise ValueError("model.group_size is not set, and neither is data.batch_size: write model.group_size")
        refuse_lists(outputs.targets)
        if data.plan is None:
            return
        if noise_meter(trainer) is not None:
            raise ValueError(
                f"trainer.callbacks has NoiseScale, but the loss of {name} couples the examples of a batch, so that no "
                "part of it has a gradient of its own to compare: leave it out"
            )
        precision: Any = trainer.precision_plugin if trainer else Precision()
        with torch.no_grad(), precision.forward_context():
            batch = on_device(self, data, data.examples("train", 4), training=True)
            whole = outputs_of(self, data, batch, precision)
            if len(whole.inputs) < self._views:
                raise ValueError(
                    f"{type(self.loss).__name__} compares {self._views} embeddings of each example, but {name}.embed "
                    f"gives {len(whole.inputs)}: return more, or write batchwise.data.views.Views under data.augment"
                )

    def metric_names(self) -> list[str]:
        """Leave the loss out, where evaluation has too few views of an example for it."""
        return [name for name in super().metric_names() if self._compares or name != "val/loss"]

    def record(self, values: dict[str, Tensor]) -> None:
        """Leave the loss out, where evaluation has too few views of an example for it."""
        none = () if self._compares else ("val/loss", "test/loss")
        super().record({name: value for name, value in values.items() if name not in none})

    # The loss

    @property
    def _views(self) -> int:
        return self.loss.views if self.loss else 1

    def _outputs(self, batch: MicroBatch) -> MicroBatch:
        """Return a micro-batch with its embeddings as inputs."""
        return replace(batch, inputs=checked(self.embed(batch), len(batch), type(self).__name__))

    def losses(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return the loss of each example [N] and its weight [N], of a batch that is whole."""
        whole = self._outputs(batch)
        if self.training and self._measures.row_is_due:
            self.measure(*self._answers(whole))
        return self._pairs(whole)

    def _pairs(self, whole: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return losses and weights [B]; an example of weight zero is none, not even for others to differ from."""
        batch, rows = present(whole)
        embeddings: tuple[Tensor, ...] = batch.inputs
        first = embeddings[0]
        if len(batch) == 0 or len(embeddings) < self._views:  # in evaluation, there is one view
            losses: Pairs = first.flatten(1).sum(1) * 0, first.new_zeros(len(first))
        else:
            with torch.autocast(first.device.type, enabled=False):
                losses = self.pair_losses(embeddings, batch.targets)
                if isinstance(losses, dict):
                    raise ValueError(f"{type(self).__name__}.pair_losses gives a dict: add its terms up to one tensor")
        if isinstance(losses, Tensor):
            losses = losses, torch.ones_like(losses)
        losses, weights = losses
        if losses.shape != (len(batch),) or weights.shape != losses.shape:
            raise ValueError(
                f"{type(self).__name__}.pair_losses gave the shape {list(losses.shape)} for {len(batch)} examples: "
                "return one loss per example [B]"
            )
        return spread(losses, rows, len(whole)), spread(weights.to(losses), rows, len(whole))

    @torch.no_grad()
    def _answers(self, whole: MicroBatch) -> tuple[Tensor, Tensor]:
        batch, rows = present(whole)
        if len(batch) == 0:
            return whole.inputs[0].new_zeros(len(whole)), whole.inputs[0].new_zeros(len(whole))
        answers, weights = self.answers(batch.inputs, batch.targets)
        return spread(answers, rows, len(whole)), spread(weights, rows, len(whole))

    # Training

    def _look_ahead(self, batch: Batch, key: int) -> None:
        """Find the loss of the whole batch and its gradient with respect to the embeddings."""
        self._ahead = None
        trainer: Any = self.trainer
        if trainer.world_size == 1 and len(batch.micro_batches) == 1:
            return
        context = trainer.precision_plugin.train_step_context
        parts, logged = [], self._step._results.mark()
        with torch.no_grad():
            with kept_buffers(self):  # the second pass moves running statistics
                for micro_batch in batch.micro_batches:
                    begin(self, micro_batch, key)
                    copy = micro_batch._map(torch.clone)  # because a transform may work in place
                    with context():
                        parts.append(self._outputs(self.data.to_device(copy, self.device, training=True)))
            for ghost in self._step.ghosts:
                ghost.zero_sums()
            self._step._results.rewind(logged)
            whole = join(batch.size, parts, lambda rows: reduce(self, rows))
        begin(self, replace(whole, counts=trainer.is_global_zero), key)  # what it logs counts once
        try:
            with context():
                self._ahead = self._backward(whole, trainer.world_size * len(batch.micro_batches))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingStopped(
                f"the loss over {batch.size} examples at once does not fit, whatever the micro-batches are: write a "
                "smaller data.batch_size"
            ) from error

    def _backward(self, whole: MicroBatch, parts: int) -> Ahead:
        whole = replace(whole, inputs=tuple(each.requires_grad_() for each in whole.inputs))
        losses, weights = self._pairs(whole)
        losses_sum, _ = weighted_sum(losses, whole.weights, weights)
        own = [parameter for parameter in self.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(losses_sum, [*whole.inputs, *own], allow_unused=True)
        pairs = list(zip([*whole.inputs, *own], found, strict=True))
        count = len(whole.inputs)
        gradients = [torch.zeros_like(each) if grad is None else grad for each, grad in pairs[:count]]
        used = [(each, grad) for each, grad in pairs[count:] if grad is not None]
        answers = self._answers(whole) if self._measures.row_is_due else None
        assert whole.weights is not None
        return Ahead(losses.detach(), weights * whole.weights.to(weights), gradients, used, answers, parts)

    def _summed_loss(self, batch: MicroBatch, *player: str) -> tuple[Tensor, Number]:
        """Return the loss sum and count of the examples of a micro-batch; its gradient is that of the whole batch."""
        ahead = self._ahead
        if ahead is None or place.current is None:
            return super()._summed_loss(batch)
        embeddings = self._outputs(batch).inputs
        rows = slice(batch.position, batch.position + len(batch))
        if batch.counts:
            gradients = [gradient[rows] for gradient in ahead.gradients]
            loss, count = weighted_sum(ahead.losses[rows], None, ahead.weights[rows])
        else:
            gradients = [torch.zeros_like(each) for each in embeddings]
            loss, count = ahead.losses.new_zeros(()), 0
        surrogate = torch.stack([(each * own).sum() for each, own in zip(embeddings, gradients, strict=True)]).sum()
        # Each device has as many micro-batches as any other, and each of them an equal part of these gradients. So
        # they are the same with a strategy that averages over devices and with one that leaves them alone.
        for parameter, gradient in ahead.own:
            surrogate = surrogate + (parameter * gradient).sum() / ahead.parts
        if ahead.answers is not None:
            self.measure(*(each[rows] for each in ahead.answers))
        return loss + (surrogate - surrogate.detach()), count

    # Evaluation

    def _evaluate(self, batch: MicroBatch) -> None:
        data, groups, trainer = self.data, self._groups, self.trainer
        if groups is None or int(batch.index[0]) < groups.seen:  # what an evaluation that was interrupted has left
            examples = data.split("test" if trainer.testing else "val")
            assert examples is not None
            groups = self._groups = Groups(len(examples), self.group_size or data.batch_size or 1)
        for group in groups.add(self._outputs(data.to_device(batch, self.device, training=False))):
            self._add_group(group)

    def _conclude_evaluation(self) -> None:
        """Add the groups that lie across the borders of the devices' shards."""
        groups, self._groups = self._groups, None
        hook, self._current_fx_name = self._current_fx_name, "test_step" if self.trainer.testing else "validation_step"
        for group in groups.rest(self) if groups else ():
            if self.trainer.is_global_zero:
                self._add_group(group)
        self._current_fx_name = hook
        self.measure(torch.zeros(0, device=self.device), torch.zeros(0, device=self.device))  # at least once

    @torch.no_grad()
    def _add_group(self, group: MicroBatch) -> None:
        place.current = place.Place(0, 0, size=len(group))  # by which a value that is logged is weighted
        try:
            losses, weights = self._pairs(group)
        finally:
            place.current = None
        self.measure(*self._answers(group))
        measures = self._measures
        measures.evaluation = measures.evaluation.plus(*weighted_sum(losses, group.weights, weights))
