"""A stand-in for Apple's `mps`, for machines without one: Lightning's `auto` takes it, and it is as strict.

What a tensor on it holds is computed on the host, by a tensor inside, so results agree with the host's. But as on the
real device

- an operation takes tensors of one device (scalars, and indices, may be on the host);
- there is no float64;
- a tensor becomes a NumPy array only after it was copied to the host.

`WAITS` has the operations that had to wait for the device: values that were read, and copies to the host. `SENT` has
the copies to the device during which the host waits.
"""

import contextlib
from collections.abc import Iterator
from functools import partial, wraps
from typing import Any
from unittest import mock

import pytest
import torch
from examples import MAKE
from lightning.fabric.accelerators.mps import MPSAccelerator
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HERE = torch.device("mps", 0)
ELSEWHERE = "meta"
"""What PyTorch's own code believes the device to be: one without data, so that it computes shapes and no more."""
MAY_MIX = ("_to_copy", "copy_", "_foreach_copy_", "set_", "index", "_index", "_unsafe_index")
"""The operations whose tensors may be on two devices, by the beginning of their names."""
WAITS: list[str] = []
SENT: list[str] = []
LONG = ("bert", "lora", "forecast", "find")  # each for several seconds, because the stand-in is slow
EXAMPLES = [pytest.param(name, marks=[pytest.mark.weekly] if name in LONG else []) for name in MAKE]
"""The complete files in docs, for tests of each."""


class Far(Tensor):
    """A tensor on the stand-in."""

    near: Tensor
    lacks: tuple[torch.dtype, ...] = (torch.float64, torch.complex128)
    is_cpu = is_meta = False  # pyright: ignore[reportAssignmentType]
    is_mps = True  # pyright: ignore[reportAssignmentType]
    device = HERE  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        if near.dtype in cls.lacks:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        like = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        made = Tensor._make_wrapper_subclass(cls, near.size(), **like, device=ELSEWHERE)  # type: ignore[attr-defined]
        made.near = near
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert mps:0 device type tensor to numpy.")

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __repr__(self, **_: Any) -> str:
        return f"Far({self.near})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.near.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = self.detach().clone()
        copy = nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy
        return memo.setdefault(id(self), copy)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Make an operation on the tensors inside, and return its result on the device where it belongs."""
    name, tensors = func.overloadpacket.__name__, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    far = [x for x in tensors if isinstance(x, Far)]
    if far and not name.startswith(MAY_MIX) and not all(isinstance(x, Far) or x.dim() == 0 for x in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found mps:0 and cpu! ({func})")
    device = kwargs.get("device")
    if not far and (device is None or device.type != ELSEWHERE):
        return func(*args, **kwargs)
    stays = bool(far) if device is None else device.type == ELSEWHERE
    if far and (name == "_local_scalar_dense" or not stays):
        WAITS.append(name)
    came = name in ("_to_copy", "copy_") and stays and not all(isinstance(x, Far) for x in tensors)
    if came and not (kwargs.get("non_blocking") or (name == "copy_" and args[2:])):
        SENT.append(name)
    here = {"device": torch.device("cpu"), "pin_memory": False}
    kwargs = {key: here.get(key, value) for key, value in kwargs.items()}
    with DisableTorchFunctionSubclass():
        found = func(*tree_map(nearer, args), **tree_map(nearer, kwargs))
    if torch.Tag.inplace_view in func.tags:  # which gives a tensor another shape
        with no_dispatch():
            func(*args, **kwargs)
    if name == "copy_":
        return args[0]
    known = {id(x.near): x for x in far}  # an operation in place returns the tensor that it was given

    def farther(value: Any) -> Any:
        return known[id(value)] if id(value) in known else Far(value) if isinstance(value, Tensor) else value

    return tree_map(farther, found) if stays else found


def nearer(value: Any) -> Any:
    return value.near if isinstance(value, Far) else value


class Operations(TorchDispatchMode):
    """Makes the operations that create tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Names(TorchFunctionMode):
    """Gives PyTorch's own code the device that it is to believe in."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and elsewhere(kwargs.get("device")) == ELSEWHERE:
            if isinstance(args[0], Tensor):
                return args[0].to(ELSEWHERE, kwargs.get("dtype"))
            learnt = kwargs.pop("requires_grad", False)
            made = func(*args, **kwargs | {"device": "cpu"}).to(ELSEWHERE)  # with the numbers
            return made.requires_grad_() if learnt else made
        if func is Tensor.new_tensor and isinstance(args[0], Far):
            return torch.tensor(args[1], dtype=args[0].dtype).to(ELSEWHERE)
        return func(*map(elsewhere, args), **{key: elsewhere(value) for key, value in kwargs.items()})


def elsewhere(value: Any) -> Any:
    mine = isinstance(value, torch.device | str) and str(value).split(":")[0] == HERE.type
    return ELSEWHERE if mine else value


@contextlib.contextmanager
def mps(float64: bool = False) -> Iterator[None]:
    """Have the stand-in in this process. With float64, it has what a GPU has."""
    WAITS.clear()
    SENT.clear()
    no_grad = wraps(torch.inference_mode)(lambda mode=True: torch.no_grad())  # it knows no such tensors
    with (
        mock.patch.object(MPSAccelerator, "is_available", return_value=True),
        mock.patch.object(torch, "inference_mode", no_grad),
        mock.patch.object(Far, "lacks", () if float64 else Far.lacks),
        mock.patch.object(torch.mps, "synchronize", partial(WAITS.append, "synchronize")),
        mock.patch.object(torch.mps, "empty_cache", partial(WAITS.append, "empty_cache")),
        Names(),
        Operations(),
    ):
        yield
