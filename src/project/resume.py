"""Finding a checkpoint, reading it, and telling whether training may go on from it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EXECUTION = ("batch_size", "micro_batch_size", "eval_batch_size", "num_workers", "max_unreadable", "resident_share")
"""Settings of the data module that may change on resume: they do not decide which examples form a batch. (Of the batch
size the fingerprint tells; it may be given in several ways.)"""

OF_LIGHTNING = "lightning.pytorch.cli.instantiate_module"


def find_checkpoint(root: Path, name: str, which: str) -> Path | None:
    """Return the checkpoint `last` or `best` of the newest run of that name that has one which can be read.

    Where `last` cannot be read, `previous` or else `best` of the same run takes its place.
    """
    for folder in sorted((root / name).glob("*/checkpoints"), reverse=True):
        wanted = folder / f"{which}.ckpt"
        if not wanted.exists() and not (which == "last" and (folder / "previous.ckpt").exists()):
            continue
        spares = [folder / "previous.ckpt", folder / "best.ckpt"] if which == "last" else []
        for path in (wanted, *spares):
            problem = unreadable(path)
            if problem is None:
                return path
            if path.exists():
                print(f"{path} cannot be read ({problem}): trying the one before it", flush=True)
    return None


def unreadable(path: Path) -> str | None:
    """Return why a checkpoint cannot be read, or None if it can. Only plain types are ever loaded."""
    try:
        read_checkpoint(path)
    except Exception as error:
        if "weights_only" in str(error):  # PyTorch goes on to advise to load it all the same
            return "it holds code, or objects other than tensors and plain types"
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return None


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint without copying its tensors into memory.

    The folder of a checkpoint's archive is written last, so a file that opens is whole.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError("it is not a checkpoint of this project")
    maker = (checkpoint.get("hyper_parameters") or {}).get("_instantiator", OF_LIGHTNING)
    if maker != OF_LIGHTNING:  # which Lightning would import and call, where it makes a module from a checkpoint
        raise ValueError(f"it names code to run: {maker}")
    return checkpoint


def weight_differences(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """Return in a few words how the weights of a checkpoint differ in name or shape from a model's, or None."""
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


def training_differences(
    checkpoint: dict[str, Any], config: dict[str, Any], data_name: str, fingerprint: dict[str, Any]
) -> list[str]:
    """Return what differs between the training that made a checkpoint and this one, each as `key: old -> new`.

    Args:
        checkpoint: as read.
        config: the merged configuration of this training.
        data_name: the name under which the checkpoint keeps the state of the data module.
        fingerprint: what decides which examples form a batch, now.
    """
    saved = checkpoint.get("config", {})
    old = {"model": saved.get("model"), "data": _without_execution(saved.get("data"))}
    new = {"model": config["model"], "data": _without_execution(config["data"])}
    batches = checkpoint.get(data_name, {}).get("fingerprint", {})
    pairs = [*_changed(old, new), *_changed({"data": batches}, {"data": fingerprint})]
    return [f"{key}: {before!r} -> {after!r}" for key, before, after in pairs]


def _without_execution(data: dict[str, Any] | None) -> dict[str, Any] | None:
    if not data:
        return data
    settings = {key: value for key, value in (data.get("init_args") or {}).items() if key not in EXECUTION}
    return data | {"init_args": settings}


def _changed(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _changed(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key.replace(".init_args", ""), old, new
