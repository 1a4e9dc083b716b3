"""Loads a checkpoint to predict in Python. It needs no trainer and no training examples."""

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from batchwise.batching.fetch import Fetch, make_fetch
from batchwise.batching.loader import read
from batchwise.checkpoints import damage, read_checkpoint, state_of, unreadable
from batchwise.data.module import DataModule
from batchwise.models.frozen import CHECKSUM
from batchwise.run.exporting import SUFFIXES, Format, export, predictions
from batchwise.run.parser import Broken, instantiate
from batchwise.tasks.task import Task


class Trained:
    """A trained task, and the data module whose `transform` its inputs need.

    Args:
        task: has the weights of the checkpoint.
        data: has what training has learnt from its examples, such as the names of the classes.
    """

    def __init__(self, task: Task, data: DataModule) -> None:
        self.task, self.data = task, data

    @torch.inference_mode()
    def predict(self, inputs: Any, batch_size: int = 256) -> dict[str, Tensor]:
        """Return the columns that the command `predict` writes, by name, [N, ...] on the host.

        Args:
            inputs: as `load` of the data module gives them: tensors or arrays [N, ...], dicts and tuples of them, a
                list of one value per example, or `Ragged`.
            batch_size: most examples that go through the network together.
        """
        fetch = _fetch(inputs)
        batches = (read(fetch, index) for index in torch.arange(len(fetch)).split(batch_size))
        parts = [predictions(self.task, self.data, batch) for batch in batches]
        return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}

    def export(self, path: str | PathLike[str], inputs: Any) -> float:
        """Write one file that predicts without this project.

        Returns:
            The largest difference between the outputs of the file and those of the task.

        Args:
            path: .pt2 for `torch.export.load`, or .onnx.
            inputs: examples to try it on, as in `predict`.

        Raises:
            ValueError: the task cannot be exported, or the file gives something else than `predict`.
        """
        kinds: dict[str, Format] = {suffix: kind for kind, suffix in SUFFIXES.items()}
        if (kind := kinds.get(Path(path).suffix)) is None:
            raise ValueError(f"{path} ends in none of {', '.join(kinds)}: write one of them")
        return export(self.task, self.data, _fetch(inputs), Path(path), kind).difference


def load(
    path: str | PathLike[str],
    device: str | torch.device = "cpu",
    *,
    task: Task | None = None,
    data: DataModule | None = None,
) -> Trained:
    """Load a checkpoint, with its model and data module, ready to predict.

    Args:
        path: a file such as `runs/digits/TIME/checkpoints/best.ckpt`.
        device: where the network runs.
        task: a new one, made like the one that was trained. None: the configuration in the checkpoint says how.
        data: likewise.

    Raises:
        ValueError: it is no such file, or its model cannot be made here.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{path} does not exist: write a checkpoint, such as runs/NAME/TIME/checkpoints/best.ckpt")
    if reason := unreadable(file) or damage(file):
        raise ValueError(f"{path} cannot be read: {reason}")
    checkpoint = read_checkpoint(file)
    if task is None or data is None:
        if "config" not in checkpoint:
            raise ValueError(
                f"{path} has no configuration, because it was trained in Python: write "
                "batchwise.load(path, task=..., data=...), with new ones, made like those that were trained"
            )
        own_task, own_data = _made(checkpoint["config"], path)
        task, data = task or own_task, data or own_data
    return restored(task, data, checkpoint, device)


def restored(task: Task, data: DataModule, checkpoint: dict[str, Any], device: str | torch.device = "cpu") -> Trained:
    """Load a checkpoint into a task and its data module. Return them, ready to predict.

    Args:
        task: takes the weights.
        data: takes the state of the data module, such as the names of the classes.
        checkpoint: the content of the file.
        device: where the network runs.
    """
    state = checkpoint["state_dict"]
    if CHECKSUM in state:  # the checkpoint leaves out what does not learn
        task._tuning.take(task.network)
    floats = (one.dtype for one in state.values() if one.is_floating_point())
    task.to(dtype=next(floats, torch.float32)).load_state_dict(state)
    data.recall(state_of(checkpoint, data))
    task._own_data = data
    return Trained(task.to(device).eval(), data)


def _fetch(inputs: Any) -> Fetch:
    return make_fetch(inputs if hasattr(inputs, "stream") else (inputs,))


def _made(config: dict[str, Any], path: object) -> tuple[Task, DataModule]:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_instantiator(instantiate, object, subclasses=True)
    parser.add_subclass_arguments(Task, "model")
    parser.add_subclass_arguments(DataModule, "data")
    try:
        made = parser.instantiate_classes(parser.parse_object(config))
    except (ArgumentError, Broken) as error:
        raise ValueError(f"the model of {path} cannot be made here: {' '.join(str(error).split())}") from error
    return made["model"], made["data"]
