"""Exports a trained task as one file that runs without this project: by torch.export, or as ONNX."""

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from batchwise.batching.fetch import Fetch
from batchwise.batching.loader import MicroBatch, read
from batchwise.batching.structure import leaves, on_tensors, tensors
from batchwise.data.module import DataModule
from batchwise.errors import disk_is_full, optional
from batchwise.host import check_writable, whole
from batchwise.models.kept import home_of
from batchwise.models.place import evaluating
from batchwise.origin import place
from batchwise.tasks.task import Task

Format = Literal["torch", "onnx"]
SUFFIXES: dict[Format, str] = {"torch": ".pt2", "onnx": ".onnx"}
NOTES = "learnt.json"
"""The entry of the exported file that holds the data's classes, vocabulary and statistics, as JSON."""
TOLERANCE = 1e-3, 1e-4
"""Largest relative and absolute difference of an exported output: other kernels round otherwise."""
MOST = 1000
"""Examples on which the file is checked."""
LEFT = (".numpy()", "SymBool", "SymInt", "SymFloat", "FakeTensor")
"""Words in PyTorch's errors about a value that a recorded tensor does not have."""

Outputs = dict[str, Tensor]


def predictions(task: Task, data: DataModule, batch: MicroBatch) -> Outputs:
    """Return the columns that `predict` writes for a micro-batch on the host, in the precision of the weights."""
    dtype = next((one.dtype for one in task.parameters() if one.is_floating_point()), torch.float32)
    with evaluating(batch.index):
        return task.predictions(data.to_device(batch, home_of(task), training=False).cast(dtype))


class Pipeline(nn.Module):
    """From the inputs of a micro-batch, as `load` of the data module gives them, to the task's predictions by name.

    Args:
        task: in evaluation mode.
        data: has the `transform`.
    """

    def __init__(self, task: Task, data: DataModule) -> None:
        super().__init__()
        self.task, self.data = task, data

    def forward(self, inputs: Any) -> Outputs:
        """Return the columns that `predict` writes."""
        index = torch.arange(next(tensors(inputs)).shape[0])
        inputs = on_tensors(inputs, torch.clone)  # `transform` may work in place
        return predictions(self.task, self.data, MicroBatch(inputs, None, index))


class Exported(NamedTuple):
    """What was checked: the number of examples, the largest difference of an output, and the names of the outputs."""

    examples: int
    difference: float
    outputs: list[str]


def export(task: Task, data: DataModule, fetch: Fetch, path: Path, kind: Format) -> Exported:
    """Write the file, if it gives the same outputs as the task. It takes any number of examples at once.

    Args:
        task: trained, on the host.
        data: has the `transform`, and what training has learnt from its examples.
        fetch: examples to try it on, of which at most `MOST` are used.
        path: the file. It is not touched if the export fails.
        kind: torch: `torch.export.load` takes it; onnx: any runtime of ONNX does.

    Raises:
        ValueError: the task cannot be exported; the line says why.
    """
    if kind == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            optional(module, "onnx")
    samples = [read(fetch, index).inputs for index in _groups(fetch)]
    for name, leaf in leaves(samples[0], "inputs"):
        if not isinstance(leaf, Tensor):
            raise ValueError(
                f"{name} is a {type(leaf).__name__} with one value per example, and an exported network takes tensors: "
                "write `collate`, which pads them"
            )
    pipeline = Pipeline(task, data).eval()
    check_writable("path", path)
    metrics, task._measures.metrics = task._measures.metrics, None  # `predictions` may call `losses`, which measures
    try:
        with whole(path) as part, _quietly(), torch.no_grad():
            shapes = _dynamic(samples, getattr(fetch, "lengths", None) is not None)
            try:
                expected = [pipeline(sample) for sample in samples]
                outputs = list(expected[0])
                notes = {"outputs": outputs, "class_names": data.class_names, "learnt": data.learnt}
                program = torch.export.export(pipeline, (samples[0],), dynamic_shapes=(shapes,), strict=False)
                run = (_save_torch if kind == "torch" else _save_onnx)(program, samples[0], part, notes)
                found = [run(sample) for sample in samples]
            except Exception as error:
                if disk_is_full(error):
                    raise
                raise ValueError(f"{type(task).__name__} cannot be exported: {_reason(error)}") from error
            if name := next(filter(None, map(_other, expected, found)), None):
                line = f"the exported network gives another '{name}' than the task: nothing was written"
                if _other(expected[0], pipeline(samples[0])):
                    line += (
                        "; the task itself gives another one each time: draw no random numbers in it, and keep nothing "
                        "from call to call"
                    )
                raise ValueError(line)
    finally:
        task._measures.metrics = metrics
    return Exported(min(len(fetch), MOST), max(map(_difference, expected, found)), outputs)


# The examples


def _groups(fetch: Fetch) -> list[Tensor]:
    """Return numbers of examples: three to record the program with, the longest ones, then one, a few and many."""
    index, lengths = torch.arange(min(len(fetch), MOST)), getattr(fetch, "lengths", None)
    by_length = index if lengths is None else lengths.argsort(descending=True)
    recorded = by_length[torch.arange(3) % len(index)]
    return [recorded, *(group for group in (index[:1], index[1:8], *index[8:].split(256)) if len(group))]


def _dynamic(samples: list[Any], is_ragged: bool) -> Any:
    """Return the dimensions that may have any size: the examples, and whatever differs between the samples."""
    sizes = [[tensor.shape for tensor in tensors(sample)] for sample in samples]
    places, batch = iter(range(len(sizes[0]))), torch.export.Dim("batch")

    def dimensions(tensor: Tensor) -> dict[int, Any]:
        number = next(places)
        differ = [d for d in range(1, tensor.ndim) if len({shapes[number][d] for shapes in sizes}) > 1]
        if is_ragged and tensor.ndim > 1:
            differ = sorted({1, *differ})
        return {0: batch} | dict.fromkeys(differ, torch.export.Dim.DYNAMIC)

    return on_tensors(samples[0], dimensions)


# The file


def _save_torch(program: Any, sample: Any, path: Path, notes: dict) -> Callable[[Any], Outputs]:
    content = BytesIO()  # PyTorch aborts the process if it writes to a full disk
    torch.export.save(program, content, extra_files={NOTES: _json(notes)})
    path.write_bytes(content.getbuffer())
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _save_onnx(program: Any, sample: Any, path: Path, notes: dict) -> Callable[[Any], Outputs]:
    names = [re.sub(r"\W+", "_", name).strip("_") for name, _ in leaves(sample, "inputs")]
    program = program.run_decompositions()  # within torch.onnx, that of a cross-entropy forgets its reduction
    made: Any = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=names, output_names=list(notes["outputs"])
    )
    made.model.metadata_props[NOTES] = _json(notes)
    made.save(str(path))
    session = optional("onnxruntime", "onnx").InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(inputs: Any) -> Outputs:
        given = {name: tensor.numpy() for name, tensor in zip(names, tensors(inputs), strict=True)}
        known = {one.name for one in session.get_inputs()}  # one that changes nothing is left out
        found = session.run(list(notes["outputs"]), {name: value for name, value in given.items() if name in known})
        return dict(zip(notes["outputs"], map(torch.as_tensor, found), strict=True))

    return run


def _json(notes: dict) -> str:
    return json.dumps(notes, default=lambda value: value.tolist())


# The check


def _other(expected: Outputs, found: Outputs) -> str | None:
    """Return the first output that is not as expected."""
    return next((name for name, right in expected.items() if not _close(right, found[name])), None)


def _close(right: Tensor, value: Tensor) -> bool:
    return value.shape == right.shape and torch.allclose(value.double(), right.double(), *TOLERANCE, equal_nan=True)


def _difference(expected: Outputs, found: Outputs) -> float:
    pairs = [(right, found[name]) for name, right in expected.items() if right.is_floating_point() and right.numel()]
    return max(((one.double() - other.double()).nan_to_num().abs().max().item() for one, other in pairs), default=0.0)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    words = str(error)
    if "Constraints violated" in words:
        return (
            "it works only with the number of examples that it was tried with: write tensor.shape[0] in place of "
            "len(tensor), and tensor code in place of a loop over examples, `tolist`, or an `if` about their number, "
            "in `transform`, the network and `predictions`"
        )
    if type(error).__name__.startswith("GuardOnDataDependent") or any(one in words for one in LEFT):
        return (
            f"`transform`, the network or `predictions` leaves the tensors{place(error)}, by `if`, a loop, `int` or "
            "NumPy, and what then depends on the values of the data is not recorded: write tensor code, such as "
            "torch.where"
        )
    first = next((line.strip() for line in words.splitlines() if line.strip()), "no reason is given")
    reason = f"{type(error).__name__}: {first}{place(error)}"
    if "'NoneType'" in reason:
        reason += "; there are no targets here, so batch.targets is None in `transform` and `predictions`"
    if "ONNXRuntimeError" in reason:
        reason += "; the runtime has few layers in bfloat16 and float64: write the format torch, a file .pt2"
    return reason


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the notes of the exporters, and the program of one that fails, from the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)
