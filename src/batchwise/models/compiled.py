"""`torch.compile` for a network, if there is a compiler."""

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn


class _Compiled:
    """The compiled call of a network. Its class shows that the engine has compiled it, and not the user."""

    def __init__(self, call: Callable) -> None:
        def run(*args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

        # PyTorch gives up code that it has compiled eight times. So each network has a copy.
        run.__code__ = run.__code__.replace()
        # What `network.compile()` does, in a function of our own: PyTorch leaves out those of its own layers, so for an
        # `nn.Sequential` it compiles nothing, and does not say so.
        self._run = torch.compile(run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


def compile_network(network: nn.Module, device: torch.device) -> bool:
    """Compile a network in place, and keep its names. Without a compiler, say so and return False."""
    do_not_compile(network)
    missing = _missing(device)
    if missing:
        print(f"trainer.compile is true, but {missing}: training goes on without", flush=True)
        return False
    network._compiled_call_impl = _Compiled(network._call_impl)  # type: ignore[assignment]
    return True


def do_not_compile(network: nn.Module) -> None:
    """Undo `compile_network`, and leave alone what the user has compiled."""
    if isinstance(network._compiled_call_impl, _Compiled):
        network._compiled_call_impl = None


def _missing(device: torch.device) -> str | None:
    """Return what PyTorch needs to compile for a device and does not find; None: nothing."""
    if device.type == "cuda":
        return None if find_spec("triton") else "triton is not installed"
    chosen = os.environ.get("CXX")
    if chosen is not None:  # PyTorch then looks for no other one
        return None if shutil.which(chosen) else f"there is no compiler {chosen}, which the variable CXX names"
    usual, other = ("clang++", "g++") if sys.platform == "darwin" else ("g++", "clang++")
    if shutil.which(usual):
        return None
    if shutil.which(other):
        return f"there is no {usual} (write CXX={other})"
    return "there is no C++ compiler (g++ or clang++)"


@contextmanager
def parts_watched(network: nn.Module, caller: str) -> Iterator[None]:
    """Warn if what is called meanwhile is parts of a network, and not the network: only its own call is compiled.

    Args:
        network: the network.
        caller: who calls it.
    """
    called: dict[str, None] = {}
    depth = 0

    def watch(name: str) -> Callable:
        def enter(*_: Any) -> None:
            nonlocal depth
            if depth == 0:
                called[name] = None
            depth += 1

        return enter

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1

    hooks = []
    for name, module in network.named_modules():
        hooks.append(module.register_forward_pre_hook(watch(name)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        with torch.compiler.set_stance("force_eager"):  # else it would be compiled once more, with the hooks
            yield
    finally:
        for hook in hooks:
            hook.remove()
    parts = [f"network.{name}" for name in called if name]
    if parts or not called:
        past = f"calls {' and '.join(parts[:2])} by itself" if parts else "does not call it"
        warnings.warn(
            f"trainer.compile compiles the forward of model.network, but {caller} {past}, which is not compiled: let "
            "the forward do all of it",
            stacklevel=2,
        )
