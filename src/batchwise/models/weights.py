"""Weights by name: the differences between two sets of them, and the start from the weights of a file."""

from collections.abc import Mapping
from glob import glob
from pathlib import Path

import torch
from torch import Tensor, nn


def weight_differences(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """Return in a few words how a checkpoint's weights differ in name or shape from a model's; None: not at all."""
    missing = [name for name in own if name not in saved]
    unexpected = [name for name in saved if name not in own]
    reshaped = [
        f"{name} {list(saved[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in saved and saved[name].shape != own[name].shape
    ]
    kinds = (("it lacks", missing), ("it also has", unexpected), ("it has", reshaped))
    return "; ".join(f"{kind} {_some(names)}" for kind, names in kinds if names) or None


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _read(path: str) -> dict[str, Tensor]:
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ValueError(f"model.init_from {path} needs safetensors: pip install -e '.[safetensors]'") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model.init_from {path} cannot be read: {reason}") from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


@torch.no_grad()
def take_weights(network: nn.Module, path: str) -> str:
    """Copy the weights of a file that have the same names and shapes into a network. Return a line that reports it.

    Other weights keep their initial values: the last layer, for example, if the number of classes is different. The
    prefixes that `Task` and DDP put before names do not matter.

    Args:
        network: keeps its dtype and device.
        path: one of our checkpoints, a plain state dict, or a `.safetensors` file; or a pattern such as
            `runs/name/*/checkpoints/best.ckpt`, of which the last by name is taken, which is the newest run.

    Raises:
        ValueError: there is no such file, or nothing in it fits.
    """
    found = sorted(glob(path))
    if not found:
        raise ValueError(f"model.init_from {path} does not exist: write a checkpoint, state dict or safetensors file")
    path = found[-1]
    own = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    saved = {}
    for name, value in _read(path).items():
        if not name.endswith("num_batches_tracked"):
            saved[name if name in own else name.removeprefix("module.").removeprefix("network.")] = value
    fitting = [name for name in own if name in saved and saved[name].shape == own[name].shape]
    differences = weight_differences(saved, own)
    if not fitting:
        raise ValueError(f"model.init_from {path} holds nothing that fits model.network: {differences}")
    for name in fitting:
        own[name].copy_(saved[name])
    rest = f"; what does not fit: {differences}" if differences else ""
    return f"weights from {path}: {len(fitting)} of {len(own)}{rest}"
