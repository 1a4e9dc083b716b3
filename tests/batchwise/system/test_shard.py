"""Parameters cut over devices: the same batch, the same result, and one checkpoint for any number of devices."""

import re

import pytest
import torch
from helpers import CSV, DIGITS, Result, furthest, run_here, run_process

FIT = (
    *("fit", *DIGITS, *CSV, "--data.batch_size", 100, "--data.micro_batch_size", 15),
    *("--model.schedule", "{shape: constant, warmup_examples: 600}", "--trainer.gradient_clip_val", 1.0),
)
CUT_IN_TWO = "init_args: {data_parallel_size: 2, tensor_parallel_size: 1, save_distributed_checkpoint: false}"
STRATEGY = f"{{class_path: lightning.pytorch.strategies.ModelParallelStrategy, {CUT_IN_TWO}}}"
FSDP = ("--trainer.devices", 2, "--trainer.strategy", STRATEGY)


def far(ours: Result, theirs: Result, column: str) -> float:
    a, b = ours.rows(column), theirs.rows(column)
    assert len(a) > 0
    assert a.keys() == b.keys()
    return max(abs(a[step] - b[step]) for step in a)


def run(*arguments: object, **environment: str) -> Result:
    result = run_process(*FIT, *arguments, OMP_NUM_THREADS="1", **environment)
    assert result.code == 0, result.err
    return result


@pytest.mark.slow
def test_fsdp_is_one_process_and_checkpoints_serve_both() -> None:
    whole = run_here(*FIT, "--trainer.max_epochs", 3)
    first = run_here(*FIT, "--trainer.max_epochs", 1, "--name", "parts")
    sharded = run(*FSDP, "--trainer.max_epochs", 2, "--name", "parts", "--ckpt_path", "last")
    assert "resuming after step 13 " in sharded.out
    assert re.search(r"share +50\n", sharded.out)
    last = run_here(*FIT, "--trainer.max_epochs", 3, "--name", "parts", "--ckpt_path", "last")
    assert "resuming after step 26 " in last.out
    assert first.folder == sharded.folder == last.folder
    for column in ("train/loss", "gradient_norm", "val/loss"):
        assert far(last, whole, column) < 1e-5, column
    assert furthest(last, whole) < 1e-5


@pytest.mark.slow
def test_layers_are_not_cut() -> None:
    key = "--trainer.strategy.init_args"
    sizes = (f"{key}.data_parallel_size", 1, f"{key}.tensor_parallel_size", 2)
    result = run_process(*FIT, *FSDP, *sizes, OMP_NUM_THREADS="1")
    assert result.code == 2
    assert "trainer.strategy.tensor_parallel_size is 2: write 1, because layers are not cut" in result.err


def test_fsdp_of_the_first_kind_is_refused() -> None:
    if not torch.cuda.is_available():
        pytest.skip("Lightning has it on GPUs only")
    result = run_here(*FIT, "--trainer.strategy", "fsdp", "--trainer.devices", 1)
    assert result.code == 2
    assert "lightning.pytorch.strategies.ModelParallelStrategy" in result.err
