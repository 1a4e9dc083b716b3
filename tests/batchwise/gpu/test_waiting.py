"""An ordinary step does not wait for the device, and neither does its check for finite numbers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import parts
import pytest
import small
import torch

from batchwise import DataModule, Task
from batchwise.data.augment import Affine, CutOut, Flip
from batchwise.data.mixing import MixUp
from batchwise.loop import BatchOptimization
from batchwise.models.mlp import MLP
from batchwise.sources.digits import Digits
from batchwise.tasks.classification import Classification

pytestmark = pytest.mark.gpu

FIRST, LAST = 5, 25
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")
SETTINGS: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 1000, "limit_val_batches": 0}


def around(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None], after: Callable[[int], None]) -> list[int]:
    """Call functions before and after each step, without a callback, for which the loop would take a longer way."""
    original, steps = BatchOptimization.step, list[int]()

    def step(self: BatchOptimization, task: Any, batch: Any) -> Any:
        before(batch.step)
        loss = original(self, task, batch)
        after(batch.step)
        steps.append(batch.step)
        return loss

    monkeypatch.setattr(BatchOptimization, "step", step)
    return steps


MAKE: dict[str, Callable[[], Task]] = {
    "AdamW": lambda: small.Classify(small.network(), optimizer=small.adamw),
    "SGD": lambda: small.Classify(small.network(), optimizer=parts.sgd),
    "with ghost batch norm": lambda: small.Classify(
        parts.mlp(torch.nn.BatchNorm1d(8).double()), optimizer=small.adamw, ghost_batch_size=2
    ),
    "augmented": lambda: Classification(MLP(64, 10, (8,)).double(), optimizer=small.adamw),
}


DATA: dict[str, Callable[[], DataModule]] = {
    "augmented": lambda: Digits(batch_size=40, seed=0, augment=[Flip(), Affine(10), CutOut(2), MixUp(10)]),
}


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("name", MAKE)
def test_a_step_gives_no_order_to_wait(
    name: str, clip: float | None, device: torch.device, on: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch raises an error where the host would wait, from before step 5 until after step 25."""
    on_cuda = device.type == "cuda"

    def before(step: int) -> None:
        if step == FIRST and on_cuda:
            torch.cuda.set_sync_debug_mode("error")

    def after(step: int) -> None:
        if step == LAST and on_cuda:
            torch.cuda.set_sync_debug_mode("default")

    steps = around(monkeypatch, before, after)
    try:
        data = DATA.get(name, partial(small.Points, batch_size=2))()
        _, trainer = small.fit(MAKE[name](), data, gradient_clip_val=clip, max_steps=32, **SETTINGS, **on)
    finally:
        if on_cuda:
            torch.cuda.set_sync_debug_mode("default")
    assert steps == list(range(32))
    assert trainer.fit_loop.epoch_loop._is_short  # type: ignore[attr-defined]


def test_the_debug_mode_would_see_a_wait(cuda: torch.device) -> None:
    """So that the test above can fail."""
    value = torch.ones((), device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            value.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_profiler_sees_no_wait(cuda: torch.device, on: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It also sees what goes past PyTorch's debug mode, such as a library that waits."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    profiler = torch.profiler.profile(activities=activities)

    def before(step: int) -> None:
        if step == FIRST:
            torch.cuda.synchronize()
            profiler.start()
        if step in (FIRST, LAST):
            with torch.profiler.record_function("mark"):
                pass

    def after(step: int) -> None:
        if step == LAST:
            with torch.profiler.record_function("mark"):
                pass
            profiler.stop()

    around(monkeypatch, before, after)
    small.fit(data=small.Points(batch_size=2), **SETTINGS, **on)
    events = list(profiler.events())  # type: ignore[arg-type]
    marks = [event.time_range for event in events if event.name == "mark" and event.device_type.name == "CPU"]
    assert len(marks) == 3
    begin, end = marks[0].start, marks[-1].end  # the profiler itself waits, before and after
    calls = [event.name for event in events if begin <= event.time_range.start <= end]
    if not any("LaunchKernel" in name for name in calls):
        pytest.skip("the profiler does not see the calls of CUDA here")
    assert [name for name in calls if name.startswith(WAITS)] == []
