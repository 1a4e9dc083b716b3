"""Copies of the metrics are fed with a few examples before training, as an evaluation does, whole and in parts."""

import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torchmetrics import Metric

from batchwise.data.module import DataModule
from batchwise.models import place
from batchwise.tasks.cut_metrics import alone, depends_on
from batchwise.tasks.exchange import parts_of
from batchwise.tasks.losses import described
from batchwise.tasks.measures import MetricError, is_table, numbers
from batchwise.tasks.rehearsal import EXAMPLES, as_it_was, on_device

if TYPE_CHECKING:
    from batchwise.tasks.task import Task


def try_metrics(task: "Task", data: DataModule, split: str) -> None:
    """Find out what the metrics give, and on what it depends.

    Raises:
        ValueError: they cannot take what `losses` gives them; or one is another over several devices, which there are.
    """
    measures = task._measures
    metrics = measures.metrics
    if metrics is None or task._couples or task._players() != [()]:
        return
    given: list[tuple[Any, ...]] = []
    values: dict[str, Any] | None = None
    cuts: dict[str, str | None] = {}
    try:
        with as_it_was(task, data), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            measures.metrics = trial = alone(metrics)
            update = trial.update
            trial.update = lambda *values: (given.append(values), update(*values))
            task.eval()
            place.current = None
            task.losses(on_device(task, data, data.examples(split, EXAMPLES), training=False))
            if given and all(part.sync_on_compute for part in parts_of(trial)):  # else they exchange by themselves
                with suppress(Exception):  # so few examples are no data for it, such as for R2
                    values = trial.compute()
                cuts = {str(name): depends_on(metric, given[0]) for name, metric in metrics.items()}  # type: ignore[arg-type]
    except MetricError:
        raise
    except Exception:  # a hook that has not run yet may have to come first; what else is wrong, the evaluation says
        return
    finally:
        measures.metrics = metrics
    if False not in measures.fed:
        warnings.warn(
            f"{type(task).__name__} has metrics, but losses did not feed them in evaluation: call self.measure(...) "
            "with what they take",
            stacklevel=2,
        )
    if values is not None:
        measures.terms.refuse_names(set(values))
        single = [name for name, value in numbers(values).items() if value.numel() == 1]
        measures.found = single + [name for name, value in values.items() if value is None]  # of more examples, perhaps
        _name_what_is_left_out(values, measures.found, dict(metrics.items()))  # type: ignore[arg-type]
    several = data.trainer is not None and data.trainer.world_size > 1
    for name, cut in cuts.items():
        if cut == "devices" and several:
            raise MetricError(
                f"the metric '{name}' gives another value when its examples are on several devices: give each "
                "add_state of it a dist_reduce_fx, such as 'sum' or 'cat', choose another metric, or write "
                "trainer.devices 1"
            )
        if cut == "micro-batches":
            warnings.warn(
                f"the metric '{name}' gives another value when its examples come in several updates, so it depends on "
                "data.eval_batch_size, data.micro_batch_size and devices: let it add up sums over examples, give it "
                "probabilities and no logits, or choose another metric",
                stacklevel=2,
            )


def _name_what_is_left_out(values: dict[str, Any], found: list[str], metrics: dict[str, Metric]) -> None:
    for name, value in values.items():
        if name not in found and not (name in metrics and is_table(metrics[name])):
            warnings.warn(
                f"the metric '{name}' gives {described(value)}, and the log has single numbers: it is left out. "
                "torchmetrics.wrappers.ClasswiseWrapper gives each class a number",
                stacklevel=2,
            )
