"""Which checkpoint a run starts from, and whether it is of the same training."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from batchwise.callbacks.ema import EMA
from batchwise.checkpoints import damage, read_checkpoint, state_of, unreadable
from batchwise.data.contents import others
from batchwise.data.module import DataModule
from batchwise.models.frozen import CHECKSUM
from batchwise.run.folders import newest_first
from batchwise.tasks.task import Task

EXECUTION = (
    *("batch_size", "micro_batch_size", "micro_batch_tokens", "eval_batch_size"),
    *("num_workers", "max_unreadable", "resident_share"),
)
"""Settings of the data module that may change on resume, because they do not decide which examples form a batch. The
batch size may be written in several ways, so the fingerprint has it."""
STOPPING = ("patience", "min_delta", "stopping_threshold", "divergence_threshold", "check_finite")
"""Settings of EarlyStopping that decide when it ends a training."""


def settings_of(trainer: pl.Trainer, task: Task) -> dict[str, Any]:
    """Return the settings of a training that no configuration of model and data has, in plain types."""
    value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    clipping = {"gradient_clip_val": value, "gradient_clip_algorithm": getattr(algorithm, "value", "norm")}
    return {"trainer": clipping if value else {}, "model": task._rates.settings}


def leave_out_initial_weights(task: Task, checkpoint: Path | None) -> None:
    """Do not read the initial weights where a checkpoint has all weights."""
    if checkpoint is not None and CHECKSUM not in read_checkpoint(checkpoint)["state_dict"]:
        task._tuning.init_from = None


def choose_checkpoint(which: str | None, root: Path, name: str, command: str) -> Path | None:
    """Return the checkpoint that a run starts from; None: it starts afresh.

    Args:
        which: `ckpt_path`: last, best, a file, or None.
        root: the folder of all experiments.
        name: of the experiment.
        command: only `fit` can start afresh.

    Raises:
        ValueError: there is no such checkpoint, or it cannot be read.
    """
    if which is None:
        if command != "fit":
            raise ValueError(f"ckpt_path is not set: write --ckpt_path best, last or a file to {command}")
        return None
    if which not in ("last", "best"):
        path = Path(which).expanduser()
        if path.is_dir():
            raise ValueError(f"ckpt_path {which} is a folder: write last, best or a file")
        if not path.is_file():
            raise ValueError(f"ckpt_path {which} does not exist: write last, best or a file")
        problem = unreadable(path)
        if problem:
            raise ValueError(f"ckpt_path {which} cannot be read: {problem}")
        if problem := damage(path):
            raise ValueError(f"ckpt_path {which} is damaged: {problem}: write last, best or another file")
        return path
    found = _newest(root / name, which)
    if found is None:
        if command != "fit" or which == "best":
            raise ValueError(f"ckpt_path {which}: no run in {root / name} has such a checkpoint: fit first")
        if rank_zero_only.rank == 0:
            print(f"no checkpoint in {root / name}: training starts afresh", flush=True)
    return found


def _newest(runs: Path, which: str) -> Path | None:
    """Return the checkpoint `last` or `best` of the newest run that has one which can be read.

    If `last` cannot be read, `previous` or else `best` of the same run takes its place.
    """
    for folder in (run / "checkpoints" for run in newest_first(runs)):
        wanted = folder / f"{which}.ckpt"
        if not wanted.exists() and not (which == "last" and (folder / "previous.ckpt").exists()):
            if which == "best" and any(folder.glob("*.ckpt")):
                raise ValueError(
                    f"ckpt_path best: the newest run, {folder.parent}, has no best.ckpt, because no value was "
                    "finite, or because it was not validated: write last, or the file of an older run"
                )
            continue
        spares = [folder / "previous.ckpt", folder / "best.ckpt"] if which == "last" else []
        for path in (wanted, *spares):
            problem = unreadable(path) or damage(path)
            if problem is None:
                return path
            if path.exists():
                print(f"{path} cannot be read ({problem}): trying the one before it", flush=True)
    return None


def keep_the_best(checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
    """Let the callbacks know their best checkpoints again, if a run goes on in its folder.

    Lightning forgets them if the folder was moved, or is written as another path, and then replaces them by worse ones.
    It remembers one that was deleted, or was not copied, and then keeps no other in its place unless it is better.
    """
    folder = Path(str(trainer.ckpt_path)).absolute().parent
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if not isinstance(callback, ModelCheckpoint) or not state or Path(callback.dirpath or "").absolute() != folder:
            continue
        old, new = state["dirpath"], str(callback.dirpath)
        for key in ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = state[key].replace(old, new, 1)
        state["best_k_models"] = {path.replace(old, new, 1): score for path, score in state["best_k_models"].items()}
        there = {path: score for path, score in state["best_k_models"].items() if Path(path).exists()}
        if there:
            best = (min if callback.mode == "min" else max)(there, key=there.__getitem__)
            state |= {"best_k_models": there, "best_model_path": best, "best_model_score": there[best]}
        elif not Path(state["best_model_path"]).exists():
            del checkpoint["callbacks"][callback.state_key]


def ended_by(trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
    """Return the settings of each EarlyStopping that ends this training, by the key of its state."""
    return {
        key: _stopping(one) for key, one in _stoppers(trainer) if trainer.should_stop and one.stopping_reason_message
    }


def stay_ended(checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
    """Train no further, if an EarlyStopping with the same settings has ended the training before.

    Lightning would train on until the next check. It would also take the patience from the checkpoint.
    """
    for key, callback in _stoppers(trainer):
        state = checkpoint.get("callbacks", {}).get(key)
        if state and _stopping(callback) == checkpoint.get("ended_by", {}).get(key):
            trainer.should_stop = True
            if trainer.is_global_zero:
                print("EarlyStopping has ended this training: write another patience, or leave it out, to go on")
        elif state:
            state |= {"patience": callback.patience, "stopping_reason": 0, "stopping_reason_message": None}


def _stoppers(trainer: pl.Trainer) -> list[tuple[str, EarlyStopping]]:
    return [(one.state_key, one) for one in trainer.callbacks if isinstance(one, EarlyStopping)]  # type: ignore[attr-defined]


def _stopping(callback: EarlyStopping) -> dict[str, Any]:
    return {name: getattr(callback, name) for name in STOPPING}


def training_differences(
    checkpoint: dict[str, Any], config: dict[str, Any], trainer: pl.Trainer, task: Task, data: DataModule
) -> list[str]:
    """Return the differences between the training that made a checkpoint and this one, each as `key: old -> new`.

    Args:
        checkpoint: the content of the file.
        config: the merged configuration of this training; empty: it was made in Python, and has none.
        trainer: of this training.
        task: of this training.
        data: of this training.
    """
    state, settings = state_of(checkpoint, data) or {}, settings_of(trainer, task)
    half_life = next((callback.half_life for callback in trainer.callbacks if isinstance(callback, EMA)), None)  # type: ignore[attr-defined]
    average = checkpoint.get("callbacks", {}).get("EMA", {}).get("half_life_examples")
    old = checkpoint.get("settings", settings)
    if config:  # which has those of the model
        old, settings = ({"trainer": one["trainer"]} for one in (old, settings))
    pairs = [
        *(_changed(_decisive(checkpoint.get("config", {})), _decisive(config)) if config else ()),
        *_changed({"data": state.get("fingerprint", {})}, {"data": data.fingerprint()}),
        *_changed(old, settings),
        *_changed({"EMA.half_life_examples": average}, {"EMA.half_life_examples": half_life}),
    ]
    return [f"{key}: {before!r} -> {after!r}" for key, before, after in pairs]


def other_examples(checkpoint: dict[str, Any], data: DataModule) -> list[str]:
    """Return how the examples differ from those of the training that made a checkpoint."""
    before, now = (state_of(checkpoint, data) or {}).get("contents", {}), data.contents()
    return [line for split in before for line in others(split, before[split], now.get(split))]


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide the result. Where the weights come from, and which are saved, does not."""
    return {
        "model": _without(config.get("model"), ("init_from", "save_frozen")),
        "data": _without(config.get("data"), EXECUTION),
    }


def _without(settings: dict[str, Any] | None, names: tuple[str, ...]) -> dict[str, Any] | None:
    if not settings:
        return settings
    kept = {key: value for key, value in (settings.get("init_args") or {}).items() if key not in names}
    return settings | {"init_args": kept}


def _changed(old: object, new: object, key: str = "") -> Iterator[tuple[str, object, object]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _changed(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key.replace(".init_args", ""), old, new
