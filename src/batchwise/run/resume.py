"""Finding a checkpoint, and telling whether training may go on from it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchwise.checkpoints import unreadable

EXECUTION = (
    *("batch_size", "micro_batch_size", "micro_batch_tokens", "eval_batch_size"),
    *("num_workers", "max_unreadable", "resident_share"),
)
"""Settings of the data module that may change on resume: they do not decide which examples form a batch. (Of the batch
size the fingerprint tells; it may be given in several ways.)"""


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


def training_differences(
    checkpoint: dict[str, Any],
    config: dict[str, Any],
    data_name: str,
    fingerprint: dict[str, Any],
    half_life: float | None = None,
) -> list[str]:
    """Return what differs between the training that made a checkpoint and this one, each as `key: old -> new`.

    Args:
        checkpoint: as read.
        config: the merged configuration of this training.
        data_name: the name under which the checkpoint keeps the state of the data module.
        fingerprint: what decides which examples form a batch, now.
        half_life: of the average of weights, now; None: there is none.
    """
    saved = checkpoint.get("config", {})
    old, new = _what_counts(saved), _what_counts(config)
    batches = checkpoint.get(data_name, {}).get("fingerprint", {})
    average = checkpoint.get("callbacks", {}).get("EMA", {}).get("half_life_examples")
    pairs = [
        *_changed(old, new),
        *_changed({"data": batches}, {"data": fingerprint}),
        *_changed({"EMA.half_life_examples": average}, {"EMA.half_life_examples": half_life}),
    ]
    return [f"{key}: {before!r} -> {after!r}" for key, before, after in pairs]


def _what_counts(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide what is computed. (Where the first weights came from no longer does.)"""
    return {
        "model": _without(config.get("model"), ("init_from",)),
        "data": _without(config.get("data"), EXECUTION),
    }


def _without(settings: dict[str, Any] | None, names: tuple[str, ...]) -> dict[str, Any] | None:
    if not settings:
        return settings
    kept = {key: value for key, value in (settings.get("init_args") or {}).items() if key not in names}
    return settings | {"init_args": kept}


def _changed(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _changed(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key.replace(".init_args", ""), old, new
