"""A mistake is one line that names key, value and remedy; exit code 2; no traceback, no usage text, nothing lost."""

from pathlib import Path

import pytest
import torch
from helpers import CSV, DIGITS, Result, run_here, run_process

import batchwise.run.parser

FIT = ("fit", *DIGITS, *CSV)
MLP = "--model.network"
OWN_DATA = """
import torch
from batchwise.data.module import DataModule

class Own(DataModule):
    def __init__(self, examples: int = 40, targets: int = 40, features: int = 64, classes: int = 10, val: int = 20,
                 kind: str = "int", **kwargs):
        super().__init__(**kwargs)
        self.shape = examples, targets, features, classes, val, kind

    def load(self, split):
        examples, targets, features, classes, val, kind = self.shape
        if split == "val":
            examples = targets = val
        y = torch.arange(targets) % classes
        x = torch.randn(examples, features) * (float("nan") if kind == "nan" and split == "val" else 1)
        return x, y.float() if kind == "float" else y
"""


@pytest.fixture
def own_data(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own_data_module.py").write_text(OWN_DATA)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    import importlib
    import sys

    sys.modules.pop("own_data_module", None)
    importlib.invalidate_caches()


def own(**settings: object) -> tuple[str, str]:
    arguments = ", ".join(f"{name}: {value}" for name, value in {"batch_size": 8, **settings}.items())
    return "--data", f"{{class_path: own_data_module.Own, init_args: {{{arguments}}}}}"


def fails(result: Result, *words: str, code: int = 2) -> None:
    """Hold a result to one line of error that has all the words."""
    assert result.code == code, result.out + result.err
    lines = [line for line in result.err.splitlines() if not line.startswith(("note:", "warning:"))]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 500
    for word in words:
        assert word in lines[0], lines[0]
    assert "Traceback" not in result.err
    assert "usage:" not in result.out + result.err
    assert "epoch 1" not in result.out  # nothing was trained
    assert not list(Path("runs").glob("*/*"))  # and nothing is left lying about


def file(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


COMMAND_LINE = {
    "batch size zero": (["--data.batch_size", "0"], ["data.batch_size is 0", "at least 1"]),
    "batch size negative": (["--data.batch_size", "-3"], ["data.batch_size is -3", "at least 1"]),
    "batch size a word": (["--data.batch_size", "many"], ["data.batch_size is many", "write a whole number"]),
    "batch size a fraction": (["--data.batch_size", "2.5"], ["data.batch_size is 2.5", "write a whole number"]),
    "batch size null": (["--data.batch_size", "null"], ["data.batch_size is not set", "examples per optimizer step"]),
    "batch larger than the data, dropped": (
        ["--data.batch_size", "5000", "--data.drop_last", "true"],
        ["5000", "1259", "drop_last: false"],
    ),
    "three that contradict": (
        ["--data.micro_batch_size", "10", "--trainer.accumulate_grad_batches", "3"],
        ["batch_size 64", "3 micro-batches of at most 10", "accumulate_grad_batches 7", "micro_batch_size 22"],
    ),
    "more micro-batches than examples": (
        ["--trainer.accumulate_grad_batches", "65"],
        ["batch_size 64", "65 micro-batches", "write accumulate_grad_batches 64"],
    ),
    "accumulation zero": (["--trainer.accumulate_grad_batches", "0"], ["accumulate_grad_batches is 0"]),
    "misspelt flag": (["--data.batchsize", "3"], ["data.batchsize", "did you mean data.batch_size?"]),
    "misspelt trainer flag": (["--trainer.max_epoch", "3"], ["trainer.max_epoch", "did you mean trainer.max_epochs?"]),
    "abbreviated flag": (["--trainer.max_ep", "3"], ["trainer.max_ep", "did you mean trainer.max_epochs?"]),
    "unknown precision": (["--trainer.precision", "bf17"], ["trainer.precision is bf17", "bf16-mixed"]),
    "unknown network": (["--model.network", "nosuch.Net"], ["model.network", "nosuch.Net", "No module named"]),
    "unknown class in a module": (["--model.network", "torch.nn.Nosuch"], ["model.network", "torch.nn.Nosuch"]),
    "width a word": (["--model.network.in_features", "x"], ["model.network.in_features is x: write a whole number"]),
    "rate a word": (["--model.optimizer.lr", "x"], ["model.optimizer.lr is x: write a number"]),
    "a misspelt setting of a network": (
        ["--model.network.in_featurs", "3"],
        ["model.network.in_featurs", "did you mean model.network.in_features?"],
    ),
    "unknown data": (["--data", "nosuch.Data"], ["data", "nosuch"]),
    "unknown norm": (["--model.network.norm", "foo"], ["norm is 'foo'", "none, layer, batch"]),
    "missing config": (["--config", "nosuch.yaml"], ["--config nosuch.yaml", "No such file"]),
    "missing checkpoint": (["--ckpt_path", "nosuch.ckpt"], ["ckpt_path nosuch.ckpt", "does not exist", "last"]),
    "best of no run": (["--ckpt_path", "best"], ["ckpt_path best", "runs/digits", "fit first"]),
    "read-only root": (["--trainer.default_root_dir", "/proc/here"], ["/proc/here", "default_root_dir"]),
    "root is a file": (["--trainer.default_root_dir", "/etc/hostname"], ["/etc/hostname", "default_root_dir"]),
    "no GPU": (["--trainer.accelerator", "gpu"], ["gpu"]),
    "no device": (["--trainer.devices", "0"], ["devices"]),
    "too few outputs": (["--model.network.num_classes", "9"], ["label 9", "9 outputs", "num_classes 10"]),
    "batch norm over one example": (
        ["--model.network.norm", "batch", "--data.micro_batch_size", "1"],
        ["batch norm", "one example", "model.ghost_batch_size", "data.drop_last true"],
    ),
    "a key that no class has": (["--model.nothing", "3"], ["model.nothing", "**kwargs"]),
    "wrong feature size": (["--model.network.in_features", "63"], ["[1, 8, 8]", "63"]),
    "rate negative": (["--model.optimizer.lr", "-1"], ["learning rate", "-1"]),
    "rate negative, with its key": (["--model.optimizer.lr", "-1"], ["model.optimizer.lr: ", "write at least 0"]),
    "beta": (["--model.optimizer.betas", "[1.5, 0.9]"], ["model.optimizer.betas: ", "1.5", "at least 0 and below 1"]),
    "eps": (["--model.optimizer.eps", "-2"], ["model.optimizer.eps: ", "-2", "write at least 0"]),
    "decay": (["--model.optimizer.weight_decay", "-2"], ["model.optimizer.weight_decay: ", "-2", "write at least 0"]),
    "devices a word": (["--trainer.devices", "two"], ["trainer.devices is two: write a number of at least 1"]),
    "devices of no words": (["--trainer.devices", ""], ["trainer.devices is '': write a number of at least 1"]),
    "devices below none": (["--trainer.devices", "-2"], ["trainer.devices is -2: write a number of at least 1"]),
    "devices none": (["--trainer.devices", "0"], ["trainer.devices is 0: write a number of at least 1"]),
    "interval negative": (["--trainer.val_check_interval", "-1"], ["trainer.val_check_interval is -1: write a number"]),
    "interval odd": (["--trainer.val_check_interval", "1.5"], ["trainer.val_check_interval is 1.5: write a number"]),
    "limit negative": (["--trainer.limit_test_batches", "-1"], ["trainer.limit_test_batches is -1: write a number"]),
    "limit odd": (["--trainer.limit_train_batches", "1.5"], ["trainer.limit_train_batches is 1.5: write a number"]),
    "trial negative": (["--trainer.fast_dev_run", "-1"], ["trainer.fast_dev_run is -1: write at least 0"]),
    "predictions of a training": (["--predictions", "x.csv"], ["--predictions is what predict writes, and fit writes"]),
    "schedule without an end": (
        ["--trainer.max_epochs", "-1"],
        ["model.schedule", "cosine", "trainer.max_epochs or trainer.max_steps"],
    ),
    "warm-up beyond training": (["--model.schedule.warmup", "1.5"], ["schedule.warmup is 1.5", "0 to 1"]),
    "workers negative": (["--data.num_workers", "-1"], ["data.num_workers is -1"]),
    "Lightning's sampler": (["--trainer.use_distributed_sampler", "true"], ["use_distributed_sampler", "leave it out"]),
}


@pytest.mark.parametrize(("arguments", "words"), COMMAND_LINE.values(), ids=COMMAND_LINE.keys())
def test_command_line(arguments: list[str], words: list[str]) -> None:
    fails(run_here(*FIT, *arguments), *words)


FILES = {
    "misspelt key": ("trainer: {max_epoch: 3}", ["max_epoch", "did you mean trainer.max_epochs?"]),
    "misspelt key of data": ("data: {init_args: {batchsize: 3}}", ["data.batchsize", "did you mean data.batch_size?"]),
    "misspelt section": ("trainr: {max_epochs: 3}", ["trainr", "did you mean trainer.max_epochs?"]),
    "malformed": ("trainer: {max_epochs: 3", ["over.yaml", "line 1"]),
    "a list": ("[1, 2]", ["over.yaml"]),
    "empty": ("", ["over.yaml"]),
}


@pytest.mark.parametrize(("text", "words"), FILES.values(), ids=FILES.keys())
def test_configuration_file(text: str, words: list[str]) -> None:
    fails(run_here(*FIT, "--config", file("over.yaml", text)), *words)


def test_no_configuration() -> None:
    fails(run_here("fit"), "data", "model", "--config")


def test_unknown_command() -> None:
    fails(run_here("fitt"), "fitt", "fit")


DATA = {
    "unequal lengths": (own(targets=39), ["40 and 39"]),
    "no examples": (own(examples=0, targets=0), ["train", "no examples"]),
    "no validation examples": (own(val=0), ["val", "no examples"]),
    "fractions as labels": (own(kind="float"), ["train", "float", "whole number"]),
    "label out of range": (own(classes=11), ["label 10 at example 10", "10 outputs"]),
}


@pytest.mark.usefixtures("own_data")
@pytest.mark.parametrize(("arguments", "words"), DATA.values(), ids=DATA.keys())
@pytest.mark.slow
def test_data(arguments: tuple[str, str], words: list[str]) -> None:
    fails(run_here(*FIT, *arguments), *words)


@pytest.mark.usefixtures("own_data")
@pytest.mark.slow
def test_odd_data_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="all 40 training examples have the label 0"):
        result = run_here(*FIT, *own(classes=1), "--trainer.max_steps", 1)
    assert result.code == 0
    with pytest.warns(UserWarning, match="batch_size is 50, but an epoch has only 40 examples: each epoch is one step"):
        result = run_here(*FIT, *own(batch_size=50), "--trainer.max_steps", 1)
    assert result.code == 0


@pytest.mark.usefixtures("own_data")
def test_where_nothing_could_be_compared_nothing_is_the_best() -> None:
    best = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {monitor: val/loss, filename: best}}"
    result = run_here(*FIT, *own(kind="nan"), "--trainer.callbacks", f"[{best}]", "--trainer.max_epochs", 2)
    assert result.code == 0, result.err
    assert "val/loss nan" in result.out
    assert "no checkpoint is the best: val/loss was never a finite number" in result.out
    assert "test it:" not in result.out
    assert not (result.folder / "checkpoints" / "best.ckpt").exists()
    early = "{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/loss}}"
    result = run_here(*FIT, *own(kind="nan"), "--trainer.callbacks", f"[{early}]", "--trainer.max_epochs", 2)
    assert "stopped early: Monitored metric val/loss = nan is not finite" in result.out


def test_misspelt_monitor() -> None:
    early = "{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/acuracy}}"
    fails(run_here(*FIT, "--trainer.callbacks", f"[{early}]"), "val/acuracy", "val/accuracy")


def other_checkpoints(trained: Result) -> dict[str, tuple[list[object], list[str]]]:
    last = trained.folder / "checkpoints" / "last.ckpt"
    Path("truncated.ckpt").write_bytes(last.read_bytes()[:-1000])
    Path("empty.ckpt").write_bytes(b"")
    torch.save({"weights": torch.zeros(3)}, "foreign.ckpt")
    torch.save(torch.nn.Linear(2, 2), "pickle.ckpt")
    return {
        "truncated": (["--ckpt_path", "truncated.ckpt"], ["truncated.ckpt", "cannot be read"]),
        "empty": (["--ckpt_path", "empty.ckpt"], ["empty.ckpt", "cannot be read"]),
        "a folder": (["--ckpt_path", "/tmp"], ["ckpt_path /tmp is a folder", "write last, best or a file"]),
        "foreign": (["--ckpt_path", "foreign.ckpt"], ["foreign.ckpt", "not a checkpoint of this project"]),
        "a pickled network": (["--ckpt_path", "pickle.ckpt"], ["pickle.ckpt", "cannot be read"]),
        "another model": (
            ["--ckpt_path", last, "--model.network.hidden_features", "[32]"],
            ["another model", "layers.1.weight", "[512, 64]", "[32, 64]"],
        ),
        "another rate": (["--ckpt_path", last, "--model.optimizer.lr", "0.1"], ["lr: 0.003 -> 0.1", "--force true"]),
        "another batch size": (["--ckpt_path", last, "--data.batch_size", "32"], ["batch_size: 64 -> 32", "--force"]),
        "fewer epochs": (
            ["--ckpt_path", last, "--trainer.max_epochs", "1"],
            ["trainer.max_epochs is 1", "has trained for 20 epochs", "write more"],
        ),
        "another clipping": (
            ["--ckpt_path", last, "--trainer.gradient_clip_val", "0.5"],
            ["trainer.gradient_clip_val: None -> 0.5", "--force true"],
        ),
        "another seed": (["--ckpt_path", last, "--seed_everything", "7"], ["seed: 0 -> 7", "--force"]),
        "another order": (
            ["--ckpt_path", last, "--data.order", "batchwise.batching.order.Sequential"],
            ["order", "Shuffled", "Sequential"],
        ),
    }


NAMES = (
    "truncated empty foreign|a folder|a pickled network|another model|another rate|another batch size|fewer epochs|"
    "another clipping|another seed|another order"
)


@pytest.mark.parametrize("name", NAMES.replace("truncated empty ", "truncated|empty|").split("|"))
@pytest.mark.slow
def test_checkpoint(trained: Result, name: str) -> None:
    before = (trained.folder / "checkpoints" / "last.ckpt").read_bytes()
    arguments, words = other_checkpoints(trained)[name]
    fails(run_here(*FIT, *arguments), *words)
    assert (trained.folder / "checkpoints" / "last.ckpt").read_bytes() == before


@pytest.mark.slow
def test_force_goes_on_with_the_new_values() -> None:
    first = run_here(*FIT, "--trainer.max_steps", 4)
    result = run_here(
        *(*FIT, "--trainer.max_steps", 6, "--ckpt_path", "last"),
        *("--data.micro_batch_size", 8, "--model.label_smoothing", 0, "--force", "true"),
    )
    assert result.code == 0, result.err
    assert result.folder == first.folder


@pytest.mark.parametrize("limit", [0, 0.0])
@pytest.mark.parametrize("command", ["validate", "test", "predict"])
@pytest.mark.slow
def test_nothing_to_evaluate(trained: Result, command: str, limit: float) -> None:
    split = {"validate": "val"}.get(command, command)
    limits = (f"--trainer.limit_{split}_batches", limit)
    result = run_here(command, *DIGITS, *limits, "--ckpt_path", trained.folder / "checkpoints" / "last.ckpt")
    fails(result, f"trainer.limit_{split}_batches is 0, so there is nothing to {command}: write at least 1")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--trainer.max_steps", 0), "trainer.max_steps is 0: nothing is trained"),
        (("--trainer.max_epochs", 0), "trainer.max_epochs is 0: nothing is trained"),
        (("--trainer.max_time", "00:00:00:00"), "no step was trained within trainer.max_time: write more"),
    ],
)
@pytest.mark.slow
def test_where_nothing_is_trained_a_line_says_so(arguments: tuple[object, ...], line: str) -> None:
    result = run_here(*FIT, *arguments)
    assert result.code == 0, result.err
    assert line in result.out.splitlines()


@pytest.mark.slow
def test_a_share_of_less_than_one_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="limit_train_batches is 0.001, which is less than one step of an epoch of 20"):
        run_here(*FIT, *("--trainer.max_epochs", 1), "--trainer.limit_train_batches", 0.001)
    with pytest.warns(UserWarning, match="limit_test_batches is 0.0001, which is less than one example of 269"):
        run_here("test", *FIT[1:], "--trainer.limit_test_batches", 0.0001, "--ckpt_path", "last")


def test_a_checkpoint_is_needed_to_measure() -> None:
    fails(run_here("test", *DIGITS), "ckpt_path is not set", "best")


@pytest.mark.slow
def test_changing_the_class_forgets_the_settings_of_the_old(monkeypatch: pytest.MonkeyPatch) -> None:
    file("sgd.yaml", "model: {init_args: {optimizer: {class_path: torch.optim.SGD}}}")
    for arguments in (["--config", "sgd.yaml"], ["--model.optimizer", "torch.optim.SGD"]):
        result = run_here(*FIT, *arguments, "--print_config")
        settings = result.out.split("class_path: torch.optim.SGD")[1]
        assert "lr: 0.001" in settings  # SGD's own default, and not the 0.003 that was chosen for AdamW
        assert "weight_decay: 0.0\n" in settings
    kept = run_here(*FIT, "--config", "sgd.yaml", "--model.optimizer.lr", "0.3", "--print_config")
    assert "lr: 0.3" in kept.out
    monkeypatch.setattr(batchwise.run.parser, "_said", set())
    fresh = run_here(*FIT, "--config", "sgd.yaml", "--print_config")
    assert "torch.optim.SGD takes the place of torch.optim.AdamW; forgotten: lr=0.003, weight_decay=0.05" in fresh.err


@pytest.mark.parametrize("fresh", [True, False], ids=["a new interpreter", "forked"])
@pytest.mark.weekly
def test_as_a_process(fresh: bool) -> None:
    fails(run_process(*FIT, "--data.batch_size", "0", fresh=fresh), "data.batch_size is 0")
