"""Files with weights, of this project and of others, read so that they never run code."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchwise.checkpoints import OBJECTS, why_unreadable
from batchwise.models.frozen import CHECKSUM

FILES = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
    "adapter_model.safetensors",
)  # fmt: skip
"""The files with weights that a folder of Hugging Face may have. An index has the names of several others."""
USUAL = ("state_dict", "model_state_dict", "model", "network", "net", "module")
"""Where files keep weights beside other things, such as an optimizer's state or an average. The first counts."""


def read_weights(path: str) -> dict[str, Tensor]:
    """Return the weights in a file or folder by their names.

    Raises:
        ValueError: it cannot be read, or its weights have no names, or there are several sets of them.
    """
    file = Path(path)
    if file.is_dir():
        found = [file / name for name in FILES if (file / name).is_file()]
        if not found:
            raise ValueError("is a folder without weights: write one that has model.safetensors")
        file = found[0]
    part = file
    try:
        if file.name.endswith(".index.json"):
            content: Any = {}
            for part in _parts(file):
                content |= _load(part)
        else:
            content = _load(file)
    except ImportError as error:
        raise ValueError("needs safetensors: pip install -e '.[safetensors]'") from error
    except Exception as error:
        raise ValueError(f"cannot be read: {_why(part, error)}") from error
    weights = {name: value for name, value in _innermost(content).items() if isinstance(value, Tensor)}
    for name, value in weights.items():
        if not isinstance(name, str):
            raise ValueError(f"has a weight of the name {name!r}, which is no text: save module.state_dict()")
        if value.is_nested or value.is_meta or value.is_quantized or value.layout != torch.strided:
            raise ValueError(f"has {name}, which is sparse, quantized or without values: save it as a plain tensor")
    return {name: value for name, value in weights.items() if name != CHECKSUM}


def _parts(index: Path) -> list[Path]:
    """Return the files that an index names."""
    names = json.loads(index.read_text())
    if not isinstance(names, dict) or not isinstance(names.get("weight_map"), dict):
        raise ValueError("it has no weight_map")
    return [index.parent / name for name in sorted(set(names["weight_map"].values()))]


def _load(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _why(file: Path, error: Exception) -> str:
    reason = why_unreadable(file, error)
    if reason != OBJECTS:
        return reason
    named: list[str] = []
    with contextlib.suppress(Exception):  # it is of an old form, whose content PyTorch cannot list
        named = torch.serialization.get_unsafe_globals_in_checkpoint(file)  # which only reads
    whole = any(name.startswith("torch.nn.modules.") for name in named)
    return f"{'it holds a whole module' if whole else reason}: save module.state_dict()"


def _innermost(content: Any) -> Mapping[Any, Any]:
    """Return the weights of a file, out of what is around them."""
    if not isinstance(content, Mapping):
        return {}
    sets = [name for name, value in content.items() if _has_weights(value)]
    if usual := [name for name in USUAL if name in sets]:
        return _innermost(content[usual[0]])
    if any(isinstance(value, Tensor) for value in content.values()):  # what else there is may be of these weights
        return content
    if len(sets) > 1:
        raise ValueError(f"has weights in {sets[0]!r} and in {sets[1]!r}: save one of them in a file of its own")
    if sets:
        return _innermost(content[sets[0]])
    if "state_dict" in content and not isinstance(content["state_dict"], Mapping):
        kind = type(content["state_dict"]).__name__
        raise ValueError(f"has a state_dict that is {kind}, and no weights by name: save module.state_dict()")
    return content


def _has_weights(value: Any) -> bool:
    """Return whether something is a mapping of names to tensors, or has a usual one within."""
    if not isinstance(value, Mapping):
        return False
    return any(isinstance(one, Tensor) for one in value.values()) or any(map(_has_weights, map(value.get, USUAL)))
