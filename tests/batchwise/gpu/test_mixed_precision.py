"""Half precision, the scaler, compiled networks and the memory format."""

from importlib.util import find_spec
from typing import Any

import parts
import pytest
import small
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from batchwise import MicroBatch

pytestmark = pytest.mark.gpu

PLANTED_STEP = 4


def single() -> nn.Sequential:
    return parts.mlp().float()


def test_bf16_micro_batches_agree_and_training_learns(on: dict[str, Any]) -> None:
    def trained(precision: str, micro_batch_size: int | None) -> tuple[Any, float]:
        data = parts.Points(torch.float32, micro_batch_size=micro_batch_size)
        task, trainer = parts.fit(
            small.Classify(single(), optimizer=parts.sgd), data, max_epochs=4, precision=precision, **on
        )
        return task, trainer.callback_metrics["val/loss"].item()

    whole, loss = trained("bf16-mixed", None)
    cut, _ = trained("bf16-mixed", 3)
    exact, best = trained("32-true", None)
    assert 0 < small.furthest(whole, exact) < 0.1  # it was bf16, and not far from float32
    assert small.furthest(whole, cut) < 1e-2
    assert loss < best + 0.02
    assert all(value.dtype == torch.float32 for value in whole.state_dict().values())


class Overflows(parts.WithoutMetrics):
    """In one step the scaled gradient is too large for half precision; the loss is not."""

    def losses(self, batch: MicroBatch) -> Tensor:
        planted = self.training and self.global_step == PLANTED_STEP
        return super().losses(batch) * (1000 if planted else 1)


def scaled_loop(
    module: nn.Module, data: parts.Points, device: torch.device, steps: int, clip: float | None
) -> tuple[nn.Module, list[float]]:
    """Train as PyTorch's documentation says, with autocast and a GradScaler; return the module and the scales."""
    assert data.plan is not None
    module = module.to(device)
    optimizer, scaler = parts.sgd(module.parameters()), torch.amp.GradScaler(device.type)
    scales = []
    for step in range(steps):
        index = data.order.indices(step // 7, *data.plan.bounds(step))
        x, y = data.x[index].to(device), data.y[index].to(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            losses = F.cross_entropy(module(x), y, reduction="none") * (1000 if step == PLANTED_STEP else 1)
        scaler.scale(losses.sum() * (1 / len(index))).backward()
        scaler.unscale_(optimizer)
        if clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return module.cpu(), scales


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_fp16_skips_an_overflow_and_clips_the_true_gradient(
    micro_batch_size: int | None, on: dict[str, Any], device: torch.device
) -> None:
    data = parts.Points(torch.float32, micro_batch_size=micro_batch_size)
    plugin = MixedPrecision("16-mixed", device=device.type)
    task, trainer = parts.fit(
        Overflows(single(), optimizer=parts.sgd),
        data,
        max_epochs=2,
        gradient_clip_val=0.2,
        limit_val_batches=0,
        precision=None,
        plugins=[plugin],
        **on,
    )
    assert trainer.global_step == 14
    plain, scales = scaled_loop(single(), data, device, 14, clip=0.2)
    unclipped, _ = scaled_loop(single(), data, device, 14, clip=None)
    assert scales[PLANTED_STEP - 1 : PLANTED_STEP + 1] == [65536, 32768]  # so that the step was skipped
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == scales[-1] == 32768
    assert small.furthest(unclipped, plain) > 0.1  # so that clipping matters
    assert small.furthest(task.network, plain) < 3e-3


def test_a_compiled_network_computes_the_same(on: dict[str, Any], device: torch.device) -> None:
    if device.type == "cuda" and not find_spec("triton"):
        pytest.skip("triton is not installed")

    def trained(**settings: Any) -> Any:
        task = parts.WithoutMetrics(single(), optimizer=parts.sgd)
        data = parts.Points(torch.float32, batch_size=16)
        parts.fit(task, data, max_epochs=2, limit_val_batches=0, precision="32-true", **on, **settings)
        return task

    plain, compiled = trained(), trained(compile=True)
    assert compiled.network._compiled_call_impl is not None
    assert plain.network._compiled_call_impl is None
    assert parts.moved(plain, single()) > 0.05
    assert small.furthest(plain, compiled) < 1e-5


class SeesLayout(parts.WithoutMetrics):
    """Keeps the memory formats in which its first weights are used in training."""

    layouts: set[bool]

    def on_train_start(self) -> None:
        self.layouts = set()  # those of trials before training are left out

    def forward(self, inputs: Any) -> Tensor:
        outputs = super().forward(inputs)
        weight: Tensor = self.network[0].weight  # type: ignore[index, assignment]
        self.layouts.add(weight.is_contiguous(memory_format=torch.channels_last))
        return outputs


def test_channels_last_computes_the_same(on: dict[str, Any]) -> None:
    def trained(channels_last: bool) -> SeesLayout:
        task = SeesLayout(parts.convnet(), optimizer=parts.sgd)
        task.layouts = set()
        data = parts.Images(torch.float32, micro_batch_size=3)
        parts.fit(task, data, max_epochs=1, precision="32-true", channels_last=channels_last, **on)
        return task

    plain, last = trained(False), trained(True)
    assert (plain.layouts, last.layouts) == ({False}, {True})
    assert parts.moved(plain, parts.convnet()) > 0.05
    assert small.furthest(plain, last) < 1e-5
