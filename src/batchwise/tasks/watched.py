"""What `losses` reads and changes on the host. A recording of the device's work would miss it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

if TYPE_CHECKING:
    from batchwise.tasks.task import Task


class Watched:
    """Stands for a thing, and notes the names of what is read from it.

    Args:
        thing: what it stands for.
        seen: gets the names.
        prefix: put before each name.
    """

    def __init__(self, thing: Any, seen: set[str], prefix: str) -> None:
        self.__dict__.update(_thing=thing, _seen=seen, _prefix=prefix)

    def __getattr__(self, name: str) -> Any:
        self._seen.add(self._prefix + name)
        return getattr(self._thing, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._seen.add(self._prefix + name)
        setattr(self._thing, name, value)

    def __len__(self) -> int:
        return len(self._thing)

    def __bool__(self) -> bool:
        return True


class Held:
    """A tensor that an attribute is. It equals itself alone, because a recording is of its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and other.tensor is self.tensor

    __hash__ = None  # type: ignore[assignment]


def attributes_of(task: "Task") -> dict[str, Any]:
    """Return the numbers, words, lengths and tensors that the task and its layers hold, by name."""
    found: dict[str, Any] = {}
    for path, module in task.named_modules():
        for name, value in chain(vars(module).items(), module._buffers.items()):
            if isinstance(value, Tensor):
                found[f"{path}.{name}".strip(".")] = Held(value)
            elif value is None or isinstance(value, bool | int | float | str):
                found[f"{path}.{name}".strip(".")] = value
            elif isinstance(value, list | dict | set | tuple):
                found[f"{path}.{name}".strip(".")] = len(value)
    return found


def restore(task: "Task", before: dict[str, Any]) -> list[str]:
    """Restore the numbers, words and tensors of `attributes_of`, and return the names of what had changed."""
    after = attributes_of(task)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    for name in changed:
        path, _, own = name.rpartition(".")
        module = task.get_submodule(path)
        if name not in before:
            delattr(module, own)
        elif isinstance(kept := before[name], Held):
            setattr(module, own, kept.tensor)
        elif isinstance(value := getattr(module, own, None), list):
            del value[kept:]
        elif not isinstance(value, dict | set | tuple):
            setattr(module, own, kept)
    return changed


def state_of(task: "Task") -> list[Any]:
    """Return all that decides what the device does in a step, beside its inputs: places, modes, numbers on the host."""
    optimizer = task.trainer.optimizers[0]
    tensors = [*task.parameters(), *task.buffers()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    counted = tuple(path for path, module in task.named_modules() if isinstance(module, Metric))
    numbers = {name: value for name, value in attributes_of(task).items() if not (counted and name.startswith(counted))}
    learns = [parameter.requires_grad for parameter in task.parameters()]
    settings: Any = task.trainer
    return [
        [tensor.data_ptr() if tensor.layout == torch.strided else id(tensor) for tensor in tensors],
        learns,
        numbers,
        settings.gradient_clip_val,
        settings.gradient_clip_algorithm,
    ]


class _NothingOnTheHost(TorchDispatchMode):
    """Raises RuntimeError where an operation reads a tensor on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(one, Tensor) and one.is_cpu for one in tree_leaves((args, kwargs))):
            raise RuntimeError("it reads a tensor on the host")
        return func(*args, **(kwargs or {}))


@contextmanager
def only_the_device_decides(device: torch.device, is_compiled: bool) -> Iterator[None]:
    """Raise RuntimeError where the host would wait for the device, or give it a tensor."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with nullcontext() if is_compiled else _NothingOnTheHost():
            yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def no_draws(device: torch.device) -> Iterator[None]:
    """Raise RuntimeError if something is drawn from a generator of the host: Python's and NumPy's are then as before.

    PyTorch's is another one than that of the device, unless that is a CPU. It is seeded for each micro-batch.
    """
    pythons, torchs = random.getstate(), torch.get_rng_state()
    numpys: Any = np.random.get_state()
    try:
        yield
        if device.type != "cpu" and not torch.equal(torch.get_rng_state(), torchs):
            raise RuntimeError("it draws from PyTorch's generator of the host")
        after: Any = np.random.get_state()
        if random.getstate() != pythons or after[2:] != numpys[2:] or not np.array_equal(after[1], numpys[1]):
            raise RuntimeError("it draws from the generator of Python or NumPy")
    finally:
        random.setstate(pythons)
        np.random.set_state(numpys)
