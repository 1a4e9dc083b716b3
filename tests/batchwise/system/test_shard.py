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
CUT = ("--config", "configs/overlays/model_parallel.yaml")


def far(ours: Result, theirs: Result, column: str) -> float:
    a, b = ours.rows(column), theirs.rows(column)
    assert len(a) > 0
    assert a.keys() == b.keys()
    return max(abs(a[step] - b[step]) for step in a)


def run(*arguments: object, **environment: str) -> Result:
    result = run_process(*FIT, *arguments, OMP_NUM_THREADS="1", **environment)
    assert result.code == 0, result.err
    return result


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


def test_layers_cut_over_two_processes_share_one_batch() -> None:
    """The batch is divided by data-parallel processes, of which there is one, and not by all."""
    whole = run_here(*FIT, "--model.network.norm", "none", "--trainer.max_epochs", 1)
    assert whole.code == 0, whole.err
    cut = run(*CUT, "--trainer.max_epochs", 1, "--name", "cut")
    assert re.search(r"share +100\n", cut.out)
    for column in ("train/loss", "gradient_norm", "val/loss", "train/accuracy"):
        assert far(cut, whole, column) < 1e-5, column
    assert furthest(cut, whole) < 1e-5
    predicted = run_process("predict", *DIGITS, *CUT, "--name", "cut", "--ckpt_path", "last", OMP_NUM_THREADS="1")
    assert predicted.code == 0, predicted.err
    rows = (cut.folder / "predictions.csv").read_text().splitlines()[1:]
    assert [int(row.partition(",")[0]) for row in rows] == list(range(269))  # each once
    assert list(cut.folder.glob(".predictions*")) == []


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (
            ("--model.network", "batchwise.models.convnet.ConvNet"),
            "ConvNet does not say how: write tensor_parallel_size 1",
        ),
        (("--model.network.norm", "layer"), "MLP cannot cut its layers with norm layer: write norm none"),
    ],
)
def test_what_would_be_silently_wrong_is_an_error(network: tuple[str, ...], words: str) -> None:
    result = run_process(*FIT, *CUT, *network, OMP_NUM_THREADS="1")
    assert result.code != 0
    assert words in result.err


def test_fsdp_of_the_first_kind_is_refused() -> None:
    if not torch.cuda.is_available():
        pytest.skip("Lightning has it on GPUs only")
    result = run_here(*FIT, "--trainer.strategy", "fsdp", "--trainer.devices", 1)
    assert result.code == 2
    assert "configs/overlays/fsdp.yaml" in result.err
