"""`speed: auto`, and the keys that it sets."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import CSV, DIGITS, furthest, run_here
from torch import nn

from batchwise.choosing import speed
from batchwise.choosing.speed import Stopwatch, Way, candidates, choose
from batchwise.models.compiled import _missing
from batchwise.models.convnet import ConvNet
from batchwise.models.mlp import MLP
from batchwise.sources.digits import Digits
from batchwise.tasks.classification import Classification

CPU = torch.device("cpu")
CONVNET = ("--model.network", "batchwise.models.convnet.ConvNet")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "_TURN", 0.0)
    monkeypatch.setattr(Stopwatch.__init__, "__defaults__", (1,))  # round
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(1)


def test_what_is_open_is_tried() -> None:
    data, task = Digits(batch_size=200), Classification(ConvNet())
    tried = candidates(task, data, {}, CPU, processes=1)
    assert tried["precision"] == ["32-true", "bf16-mixed"]
    assert tried["channels_last"] == [False, True]
    assert tried["size"] == [32, 64, 128, 200]
    assert candidates(task, data, {}, CPU, processes=2)["size"] == [32, 64, 100]


@pytest.mark.parametrize(
    ("trainer", "data", "network", "closed"),
    [
        ({"precision": "32-true"}, {}, ConvNet(), "precision"),
        ({"threads": 2}, {}, ConvNet(), "threads"),
        ({"channels_last": True}, {}, ConvNet(), "channels_last"),
        ({"compile": True}, {}, ConvNet(), "compile"),
        ({"accumulate_grad_batches": 2}, {}, ConvNet(), "size"),
        ({}, {"micro_batch_size": 7}, ConvNet(), "size"),
        ({}, {}, nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)), "size"),
        ({}, {}, MLP(64, 10), "channels_last"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_set_or_would_change_the_result_is_left_alone(trainer, data, network, closed) -> None:
    open_keys = {"threads", "precision", "channels_last", "size", "compile"}
    if isinstance(network, nn.Sequential):
        open_keys -= {"channels_last"}
    tried = candidates(Classification(network), Digits(batch_size=64, **data), trainer, CPU, 1)
    assert tried.keys() == open_keys - {closed}


def test_sizes_are_whole_ghost_batches() -> None:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    task = Classification(network, ghost_batch_size=24)
    assert candidates(task, Digits(batch_size=96), {}, CPU, 1)["size"] == [24, 48, 96]


def test_the_fastest_is_taken_where_it_is_5_percent_faster() -> None:
    seconds = {"32-true": 1.0, "bf16-mixed": 0.97, 64: 0.8, 128: 0.5}
    asked = []

    def compare(ways: list[Way]) -> list[float]:
        asked.append(ways)
        return [seconds.get(way.size, 1.0) * seconds[way.precision] for way in ways]

    watch = SimpleNamespace(compare=compare, seconds=lambda way: 0.01)
    tried = {"precision": ["32-true", "bf16-mixed"], "size": [32, 64, 128], "compile": [False, True]}
    way, lines = choose(watch, Way(32), tried, examples=1000)  # type: ignore[arg-type]
    assert way == Way(128)
    assert len(asked) == 2  # ten seconds of training are not worth a compiler
    assert [line.strip().split()[1] for line in lines if "taken" in line] == ["1.00", "2.00"]
    choose(watch, Way(32), tried, examples=1e9)  # type: ignore[arg-type]
    assert [way.compile for way in asked[-1]] == [False, True]


def test_out_of_memory_is_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    task, data = Classification(MLP(64, 10)), Digits(batch_size=64)
    watch = Stopwatch(task, data, 64, CPU)
    losses = Classification.losses

    def hungry(self, batch):
        if len(batch) > 32:
            raise torch.OutOfMemoryError("out of memory")
        return losses(self, batch)

    monkeypatch.setattr(Classification, "losses", hungry)
    small, large = watch.compare([Way(32), Way(64)])
    assert 0 < small < large == float("inf")


SHORT = ("fit", *DIGITS, *CSV, "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 3)


@pytest.mark.slow
def test_a_run_says_what_it_chose_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    common = (*SHORT, *CONVNET, "--trainer.precision", "64-true")
    plain = run_here(*common)
    fast = run_here(*common, "--speed", "auto", "--name", "fast")
    assert fast.code == 0, fast.err
    assert "speed: auto" in fast.out
    assert furthest(plain, fast) < 1e-9
    overlay = fast.folder / "speed.yaml"
    chosen = yaml.safe_load(overlay.read_text())
    assert "precision" not in chosen["trainer"]  # which was set
    assert 32 <= chosen["data"]["micro_batch_size"] <= 64
    again = run_here(*common, "--config", overlay)
    assert again.code == 0, again.err
    assert furthest(fast, again) < 1e-9  # measuring left no trace, but two threads may add in another order
    # A restart keeps to the choice, for what is measured might tip the other way.
    monkeypatch.setattr(speed, "choose", lambda *_: pytest.fail("measured again"))
    more = run_here(*common, "--speed", "auto", "--name", "fast", "--trainer.max_epochs", 2, "--ckpt_path", "last")
    assert more.code == 0, more.err
    assert more.folder == fast.folder


@pytest.mark.weekly
def test_keys_of_the_trainer_change_speed_alone() -> None:
    common = (*SHORT, *CONVNET, "--trainer.precision", "64-true")
    plain = run_here(*common)
    for key, value in (("channels_last", "true"), ("threads", 2)):
        assert furthest(plain, run_here(*common, f"--trainer.{key}", value)) < 1e-9, key
    assert torch.get_num_threads() == 2


@pytest.mark.slow
@pytest.mark.skipif(_missing(CPU) is not None, reason="there is no C++ compiler")
def test_a_compiled_network_computes_the_same() -> None:
    """Also where layers draw what depends on the step, which is baked into no program."""
    common = (*SHORT, "--trainer.precision", "64-true")
    plain, compiled = run_here(*common), run_here(*common, "--trainer.compile", "true")
    assert compiled.code == 0, compiled.err
    assert 0 < furthest(plain, compiled) < 1e-9  # not to the bit: another program adds in another order
    assert compiled.checkpoint()["state_dict"].keys() == plain.checkpoint()["state_dict"].keys()


def test_without_a_compiler_training_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    result = run_here("fit", *DIGITS, *CSV, "--trainer.max_epochs", 1, "--trainer.compile", "true")
    assert result.code == 0, result.err
    assert result.out.count("there is no C++ compiler (g++ or clang++): training goes on without") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--trainer.threads", 0), "trainer.threads is 0: write a whole number of at least 1"),
        (("--speed", "auto", "--data.batch_size", "null"), "speed is auto, but data.batch_size is not set"),
        (("--speed", "ludicrous"), "speed"),
    ],
)
def test_bad_input(arguments, line) -> None:
    result = run_here("fit", *DIGITS, *arguments)
    assert result.code == 2
    assert line in result.err
    assert len(result.err.strip().splitlines()) == 1


@pytest.mark.slow
def test_what_is_set_after_a_choice_goes_before_it() -> None:
    common = (*SHORT, "--name", "set", "--speed", "auto")
    first = run_here(*common)
    (first.folder / "speed.yaml").write_text(
        "trainer: {precision: bf16-mixed, threads: 1}\ndata: {micro_batch_size: 32}\n"
    )
    again = ("--ckpt_path", "last", "--trainer.max_epochs", 2)
    taken = run_here(*common, *again)
    assert taken.code == 0, taken.err
    assert "micro_batch_size  32\n" in taken.out
    saved = yaml.safe_load((taken.folder / "config.yaml").read_text())
    assert saved["trainer"]["precision"] == "bf16-mixed"
    assert saved["speed"] is None
    kept = run_here(*common, *again[:-1], 3, "--trainer.precision", "32-true", "--data.micro_batch_size", 8)
    assert kept.code == 0, kept.err
    assert "micro_batch_size  8\n" in kept.out
    assert yaml.safe_load((kept.folder / "config.yaml").read_text())["trainer"]["precision"] == "32-true"


def test_with_accumulation_the_micro_batch_is_left_alone() -> None:
    result = run_here(*SHORT, "--speed", "auto", "--trainer.accumulate_grad_batches", 4)
    assert result.code == 0, result.err
    assert "micro_batch_size  16\n" in result.out


def test_several_processes_started_at_once_cannot_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    result = run_here(*SHORT, "--speed", "auto")
    assert result.code == 2
    assert "several processes were started at once" in result.err


@pytest.mark.weekly
def test_a_resume_in_another_memory_format_is_exact() -> None:
    """Fused kernels walk over memory, so the optimizer's state must have the format of the parameters."""
    constant = ("--model.schedule.shape", "constant", "--model.schedule.warmup", 0)
    common = (*SHORT, *CONVNET, *constant, "--trainer.precision", "64-true")
    reference = run_here(*common, "--name", "reference", "--trainer.max_epochs", 2)
    stopped = run_here(*common, "--name", "parts")
    assert stopped.code == 0, stopped.err
    last = ("--name", "parts", "--trainer.max_epochs", 2, "--ckpt_path", "last")
    resumed = run_here(*common, *last, "--trainer.channels_last", "true")
    assert resumed.code == 0, resumed.err
    assert furthest(reference, resumed) < 1e-9
