"""`--speed auto` and `data.micro_batch_size: auto`: measure before training, and train with the choice."""

from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator

from batchwise.choosing import automatic
from batchwise.choosing.speed import Settings
from batchwise.data.module import DataModule
from batchwise.host import use
from batchwise.tasks.task import Task

_KINDS = {"cuda": CUDAAccelerator, "mps": MPSAccelerator, "cpu": CPUAccelerator}


def choose_settings(
    model: Task, data: DataModule, trainer: Settings, config: dict[str, Any], folder: Path, everything: bool
) -> None:
    """Measure the settings that the user has left open, and set each to the fastest value.

    Args:
        model: the model that is to be trained.
        data: its data.
        trainer: the settings of the trainer; changed.
        config: the configuration in the run's folder; changed, so that it gives the same run.
        folder: the run's folder, where the choice is written.
        everything: choose all open settings (`--speed auto`), or the micro-batch alone.
    """
    path = folder / automatic.FILE
    kind, devices = _kind(trainer.get("accelerator")), trainer.get("devices")
    if isinstance(devices, str) and "," in devices:  # Lightning reads a text with a comma as a list
        devices = [int(number) for number in devices.split(",") if number.strip().isdecimal()]
    device = torch.device(kind)
    if kind == "cuda" and isinstance(devices, list) and devices:
        device = torch.device(kind, devices[0])
    use(device)
    data.prepare_data()
    model.prepare(data, "train")
    if isinstance(devices, list):
        processes = len(devices)
    elif str(devices).isdecimal():
        processes = int(str(devices))
    else:
        processes = _KINDS[kind].auto_device_count()
    automatic.measure(model, data, trainer, path, device, processes, everything)
    chosen = yaml.safe_load(path.read_text())
    for key, value in chosen["trainer"].items():
        if trainer.get(key) is None:  # a value that was set since wins
            trainer[key] = config["trainer"][key] = value
    if "data" in chosen and data.micro_batch_size is None and trainer.get("accumulate_grad_batches") is None:
        size = data.micro_batch_size = chosen["data"]["micro_batch_size"]
        config["data"].setdefault("init_args", {})["micro_batch_size"] = size
    config["speed"] = None


def _kind(accelerator: Any) -> str:
    """Return the kind of device on which the trainer will train, as Lightning chooses it."""
    there = [kind for kind, one in _KINDS.items() if accelerator in (None, "auto", "gpu", kind) and one.is_available()]
    return there[0] if there else "cpu"
