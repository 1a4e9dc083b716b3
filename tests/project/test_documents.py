"""Every configuration in configs/, and every command and every piece of code in README and docs, is run."""

import contextlib
import csv
import importlib
import io
import json
import math
import re
import runpy
import shlex
import shutil
import sys
import tarfile
import wave
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

import batchwise
from batchwise import DataModule, MicroBatch, Schedule, Task
from batchwise.choosing import search, speed
from batchwise.run.main import main
from batchwise.sources.digits import read_digits
from batchwise.tasks.classification import Classification

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {"README.md": README} | DOCS
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OVERLAYS = sorted((ROOT / "configs" / "overlays").glob("*.yaml"))
PROCESSES = ("ddp.yaml", "fsdp.yaml", "two_cpus.yaml")
"""Overlays that start processes."""
FILES = {
    "flowers": "class Flowers", "price": "class Price", "gan": "class GAN", "halves": "class Halves",
    "vae": "class VAE", "ink": "class Ink(", "find": "class Find", "distil": "class Distil",
    "forecast": "class Forecast", "lines": "class Trigrams", "both": "class Heads", "mixed": "class Turned",
    "bert": "def bert(", "lora": "def adapted(", "interval": "class Interval",
    "curriculum": "class EasyFirst", "writers": "class Writers", "folds": "class Folds",
}  # fmt: skip
"""Modules of a user's that the pages show whole, with words by which to find them."""
SHORT = {
    "text.yaml": ("--trainer.limit_train_batches", 4, "--trainer.limit_val_batches", 2, "--model.sample_length", 20)
}
"""What makes a run as short as a test has to be."""

WEEKLY = (
    "fsdp.yaml", "tasks.md: LoRA", "tasks.md: Hugging Face", "multi-device.md: More devices, more machines",
    "data.md: Cross-validation and groups", "lightning.md: One file, without this project",
    "contrastive.md: Digits of the same class are to be alike", "ddp.yaml", "text.yaml",
)  # fmt: skip

LOOP = re.compile(r"^for (\w+) in ([^;\n]+); do\n  (.*)\ndone$", re.MULTILINE)


def unrolled(loop: re.Match[str]) -> str:
    """Return what a loop of the shell runs first and last. Its body is one line."""
    name, values, body = loop.groups()
    return "\n".join(body.replace(f"${name}", values.split()[end]) for end in (0, -1))


def blocks(language: str, text: str) -> list[str]:
    """Return the blocks of code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(language: str, text: str) -> list[str]:
    """Return the commands in blocks of a language, also in loops: those of the package, and those that make data."""
    lines = [line for block in blocks(language, text) for line in LOOP.sub(unrolled, block).splitlines()]
    return [line for line in lines if line.startswith(("python -m ", "python scripts/make_"))]


SECTIONS = {
    f"{name}: {section.splitlines()[0].strip('# ')}": commands("bash", section)
    for name, page in PAGES.items()
    for section in re.split(r"^(?=#+ )", page, flags=re.MULTILINE)
    if commands("bash", section)
}
RUN = " ".join(command for section in SECTIONS.values() for command in section)


def marked(name: str) -> Any:
    """Return a case with its mark. Of commands, only those of README run with the other quick tests."""
    slow = name in SECTIONS and (not name.startswith("README.md") or name.endswith("Choosing the batch"))
    return pytest.param(name, marks=[pytest.mark.weekly] if name in WEEKLY else [pytest.mark.slow] if slow else [])


def code_of(marker: str) -> str:
    """Return the Python code of the pages that has these words."""
    (code,) = [block for page in PAGES.values() for block in blocks("python", page) if marker in block]
    return code


@pytest.fixture
def own_files(project: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that README lets a user write into src/<package>, and data such as docs/data.md speaks of."""
    folder = Path("src", project).absolute()
    folder.mkdir(parents=True)
    for name, marker in FILES.items():
        assert f"`src/{project}/{name}.py`" in "".join(PAGES.values())
        (folder / f"{name}.py").write_text(code_of(marker))
        monkeypatch.delitem(sys.modules, f"{project}.{name}", raising=False)
    for name, page in (("gan", "adversarial.md"), ("halves", "contrastive.md")):
        (settings,) = blocks("yaml", DOCS[page])
        Path(f"{name}.yaml").write_text(settings)
    package = importlib.import_module(project)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    generator = np.random.default_rng(0)
    for label, level in (("cat", 50), ("dog", 200)):
        (Path("photos") / label).mkdir(parents=True)
        for number in range(20):
            pixels = generator.integers(level, level + 50, (40, 30 + number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"photos/{label}/{number}.jpg")
    rows = [f"{number},{number % 7},{'abc'[number % 3]},{('no', 'yes')[number % 2]}" for number in range(40)]
    Path("houses.csv").write_text("\n".join(["area,rooms,town,sold", *rows]))
    reviews = [
        f"{word} {number},{stars}" for number in range(20) for stars, word in ((1, "bad"), (3, "so-so"), (5, "good"))
    ]
    Path("reviews.csv").write_text("\n".join(["text,stars", *reviews]))


def run_script(name: str) -> None:
    """Run a script as it is started by hand."""
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name])
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")


@pytest.mark.usefixtures("own_files")
@pytest.mark.parametrize("section", map(marked, SECTIONS))
def test_commands(section: str, run: Callable, project: str, first_run: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the section, in one folder, after README's first command: later ones use the runs of earlier."""
    monkeypatch.setattr(search, "SHORTEST", 20)  # shorter branches say less, but take the same way
    monkeypatch.setattr(search, "ROUNDS", 1)
    monkeypatch.setattr(speed, "_TURN", 0.01)  # seconds
    shutil.copytree(first_run[0] / "runs", "runs", symlinks=True)
    for command in SECTIONS[section]:
        words = shlex.split(command)
        if words[1] == "-m":
            assert words[2] == project
            result = run(*words[3:], process="two_cpus" in command)
            assert result.code == 0, f"{command}\n{result.err}"
        else:
            run_script(Path(words[1]).name)


@pytest.mark.usefixtures("own_files")
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.slow
def test_what_is_not_run_is_at_least_understood(page: str, run: Callable) -> None:
    """Commands that take long or need more than one machine, flags, and pieces of YAML."""
    Path("tuned.yaml").write_text("data: {init_args: {batch_size: 256}}")
    digits = ["fit", "--config", "configs/digits.yaml"]
    understood = [shlex.split(command)[3:] for command in commands("sh", PAGES[page]) if " -m " in command]
    understood += [[*digits, *shlex.split(flags)] for flags in re.findall(r"`(--[a-z][^`]* [^`A-Z]+)`", PAGES[page])]
    for number, text in enumerate(blocks("yaml", PAGES[page])):
        Path(f"{number}.yaml").write_text(text)
        understood.append([*digits, "--config", f"{number}.yaml"])
    for arguments in understood:
        result = run(*arguments, "--print_config")
        assert result.code == 0, f"{arguments}\n{result.err}"


@pytest.mark.parametrize("page", PAGES)
def test_names_and_links(page: str, project: str) -> None:
    """Whatever a page names is there: files, other pages, sections of them, modules and classes."""
    text = PAGES[page]
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\(([^)]+)\)", text):
        name, _, anchor = link.partition("#")
        if link.startswith("https:"):
            continue
        assert (folder / name).exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", (folder / name).read_text() if name else text, re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], link
    for name in re.findall(r"(?<![\w/])(?:configs|scripts|docs|src|tests)/[\w/]*\w+\.\w+", text):
        assert (ROOT / name).exists() or Path(name).stem in FILES, name
    for name in re.findall(rf"(?<![\w/.-])(?:batchwise|{project})(?:\.[A-Za-z_]\w*)+(?!\S*/)", text):
        if not set(name.split(".")) & set(FILES) and not name.endswith((".py", ".yaml")):
            assert is_there(name), name


def is_there(name: str) -> bool:
    """Return whether this is a module, or a name in one."""
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return hasattr(importlib.import_module(module), attribute)
    return True


def test_the_first_commands_stand_where_continuous_integration_looks_for_them(project: str) -> None:
    first, second = blocks("bash", README)[:2]
    assert first.endswith(f"-m {project} fit --config configs/digits.yaml\n")
    assert second == ".venv/bin/python -m pytest\n"


def test_readme_shows_what_the_first_command_prints(first_run: tuple) -> None:
    """The plan as it is, and the other lines but for their numbers."""
    (shown,) = [text for text in blocks("text", README) if "steps_per_epoch" in text]
    printed = first_run[1].out.splitlines()
    plan = [line.split() for line in printed]
    shapes = [re.sub(r"\d+", "0", line) for line in printed]
    assert len(shown.splitlines()) >= 10
    for line in shown.splitlines():
        if re.fullmatch(r" +[a-z_]+ +[\d,]+", line):
            assert line.split() in plan
        elif re.search("[a-z]", line):
            assert re.sub(r"\d+", "0", line) in shapes


@pytest.mark.usefixtures("own_files")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_readme_task_learns(run: Callable, project: str, precision: str) -> None:
    """The two classes of README together: the number of the kind of a flower, as a number."""
    result = run(
        "fit", "--data", f"{project}.flowers.Flowers", "--data.batch_size", 16, "--model", f"{project}.price.Price",
        "--model.network", f"{project}.model.Network", "--model.network.in_features", 4,
        "--model.network.num_classes", 1, "--model.optimizer.lr", 0.01, "--trainer.max_epochs", 10,
        "--trainer.accelerator", "cpu", "--trainer.logger", "false",
        "--trainer.precision", precision,
    )  # fmt: skip
    assert result.code == 0, result.err
    losses = [float(loss) for loss in re.findall(r"val/loss ([\d.]+)", result.out)]
    assert losses[-1] < 0.2 < losses[0]


@pytest.mark.usefixtures("own_files")
@pytest.mark.slow
def test_orders(run: Callable) -> None:
    """Those of docs/order.md train, the line of the plan is the one on the page, and the page's test passes."""
    printed = ""
    for number, text in enumerate(blocks("yaml", DOCS["order.md"])):
        Path(f"{number}.yaml").write_text(text)
        result = run("fit", "--config", "configs/digits.yaml", "--config", f"{number}.yaml", "--trainer.max_epochs", 1)
        assert result.code == 0, result.err
        printed += result.out
    (line,) = blocks("text", DOCS["order.md"])
    assert line in printed
    (test,) = [block for block in blocks("python", DOCS["order.md"]) if "def test_" in block]
    Path("test_order.py").write_text(test)
    assert pytest.main(["-q", "-p", "no:cacheprovider", "--noconftest", "-c", "/dev/null", "test_order.py"]) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"shape": "cosine", "warmup": 0.2, "floor": 0.1},
        {"shape": "linear", "warmup_examples": 25},
        {"shape": "constant", "warmup_examples": 64},
        {"shape": "inverse_sqrt", "warmup": 0.3, "hold_examples": 90, "floor": 0.9},
    ],
    ids=lambda settings: settings["shape"],
)
def test_the_formula_of_the_schedule(settings: dict[str, Any]) -> None:
    class Line(Task):
        def losses(self, batch: MicroBatch) -> Tensor:
            return self(batch.inputs).square().mean(1)

        def on_train_batch_end(self, *_: Any) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    class Numbers(DataModule):
        def load(self, split: str) -> tuple[Tensor, Tensor] | None:
            return (torch.ones(64, 2), torch.zeros(64)) if split == "train" else None

    (block,) = [block for block in blocks("python", DOCS["configuration.md"]) if "def factor(" in block]
    scope: dict[str, Any] = {"math": math}
    exec(block, scope)
    rates: list[float] = []
    schedule = Schedule(**settings)
    task = Line(torch.nn.Linear(2, 1), partial(torch.optim.SGD, lr=0.5), schedule)
    made = batchwise.Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False)
    made.fit(task, Numbers(batch_size=10))
    seen = sorted({64 * epoch + min(10 * step, 64) for epoch in range(2) for step in range(8)})
    assert rates == pytest.approx([0.5 * scope["factor"](schedule, *step, 128) for step in pairwise(seen)])
    assert len(set(rates)) > 3


@pytest.mark.usefixtures("own_files")
def test_folds(project: str) -> None:
    """Those of docs/data.md: each example is validated on in one fold, and no group is in two."""
    made = importlib.import_module(f"{project}.folds").Folds
    number = {tuple(image): number for number, image in enumerate((read_digits()[0].flatten(1) / 16).tolist())}
    held: list[int] = []
    for fold in range(5):
        train, val = (
            [number[tuple(image)] for image in made(fold).load(split)[0].flatten(1).tolist()]
            for split in ("train", "val")
        )
        assert sorted(train + val) == list(range(1797))
        assert {image // 10 for image in train} & {image // 10 for image in val} == set()
        held += val
    assert sorted(held) == list(range(1797))
    assert made(0).load("test") is None


@pytest.mark.usefixtures("own_files")
def test_script_of_the_page_about_tasks() -> None:
    names: dict = {}
    exec(code_of("task = VAE("), names)
    assert names["task"].trainer.global_step == 2 * 20


@pytest.mark.slow
def test_scripts_of_the_page_about_lightning(first_run: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(first_run[0] / "runs", "runs", symlinks=True)
    for script in blocks("python", DOCS["lightning.md"]):
        if "model.pt2" in script:
            trained = batchwise.load(next(Path("runs/digits").glob("*/checkpoints/best.ckpt")))
            trained.export("model.pt2", trained.data.load("test")[0])  # type: ignore[index]
        exec(script, {})
    shown = capsys.readouterr().out
    assert "epoch 4  average loss" in shown
    assert "'test/accuracy': 0.9" in shown
    assert shown.rstrip().endswith("])")  # a tensor of digits


@pytest.mark.slow
def test_the_schema_for_editors(project: str) -> None:
    """The command of docs/configuration.md. Each configuration names the schema, and is right by it."""
    assert main(project, ["schema", "schema.json"]) == 0
    written = Path("schema.json").read_text()
    schema = jsonschema.Draft202012Validator(json.loads(written))
    for path in CONFIGS + OVERLAYS:
        (name,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", path.read_text(), re.MULTILINE)
        assert (path.parent / name).resolve() == ROOT / "configs" / "schema.json"
        assert list(schema.iter_errors(yaml.safe_load(path.read_text()))) == []
    assert all(f'"{project}.{module}.' in written for module in ("data", "model", "task", "callbacks"))


@pytest.mark.parametrize("name", [marked(path.name) for path in CONFIGS])
def test_configuration(name: str, run: Callable) -> None:
    """What is printed is complete: it gives the same again. And it trains, here or in `test_commands`."""
    path = ROOT / "configs" / name
    printed = run("fit", "--config", path, "--print_config")
    assert printed.code == 0, printed.err
    Path("complete.yaml").write_text(printed.out)
    again = run("fit", "--config", "complete.yaml", "--print_config")
    assert yaml.safe_load(again.out) == yaml.safe_load(printed.out)
    if path.name not in RUN:
        result = run("fit", "--config", path, "--trainer.max_epochs", 1, *SHORT.get(path.name, ()))
        assert result.code == 0, result.err
        assert "epoch 1  average loss " in result.out


@pytest.mark.parametrize("name", [marked(path.name) for path in OVERLAYS if path.name not in RUN])
def test_overlay(name: str, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(Path.cwd()))  # no W&B login of whoever runs the tests
    path = ROOT / "configs" / "overlays" / name
    processes = name in PROCESSES
    short = ("--trainer.max_epochs", 1, *(("--trainer.limit_train_batches", 4) if processes else ()))
    result = run("fit", "--config", "configs/digits.yaml", "--config", path, *short, process=processes)
    if name == "fp16.yaml" and not torch.cuda.is_available():
        assert result.code == 2
        assert "gpu" in result.err
        return
    assert result.code == 0, result.err
    assert "epoch 1  average loss " in result.out


@pytest.mark.slow
def test_classic_prints_its_line(run: Callable) -> None:
    result = run("fit", "--config", "configs/classic.yaml", "--trainer.max_epochs", 3)
    lines = [line for line in result.out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 3
    assert re.fullmatch(r"epoch 3  average loss \d\.\d{4}", lines[2])
    assert float(lines[2].split()[-1]) < float(lines[0].split()[-1])


def test_each_column_of_the_log_is_described(run: Callable) -> None:
    noise = ("--trainer.callbacks+", "batchwise.callbacks.noise_scale.NoiseScale", "--data.micro_batch_size", 16)
    result = run(
        "fit", "--config", "configs/digits.yaml", "--config", "configs/overlays/csv.yaml", "--trainer.max_epochs", 1,
        "--trainer.log_every_n_steps", 5, *noise,
    )  # fmt: skip
    assert result.code == 0, result.err
    (path,) = Path("runs/digits").glob("*/log/version_0/metrics.csv")
    columns = path.read_text().splitlines()[0].split(",")
    (section,) = re.findall(r"^## What the log has\n(.*?)^## ", DOCS["callbacks.md"], re.DOTALL | re.MULTILINE)
    described = [re.escape(name).replace("NAME", r"\w+") for name in re.findall(r"`([^`]+)`", section)]
    assert len(columns) > 20
    assert [name for name in columns if not any(re.fullmatch(pattern, name) for pattern in described)] == ["step"]


@pytest.mark.slow
def test_table_of_numbers(run: Callable) -> None:
    """What the comments of table.yaml say for a number in place of a class."""
    run_script("make_table.py")
    text = (ROOT / "configs" / "table.yaml").read_text()
    text, count = re.subn(r"^(\s+\w+: )\S+(\s+#.*number: (\S+|\{.+\}))$", r"\1\3\2", text, flags=re.MULTILINE)
    assert count == 6
    Path("number.yaml").write_text(text)
    result = run("fit", "--config", "number.yaml", "--trainer.max_epochs", 15)
    assert result.code == 0, result.err
    assert max(float(value) for value in re.findall(r"val/r2 (-?[\d.]+)", result.out)) > 0.35


@pytest.mark.slow
def test_sweep_of_wandb(run: Callable, project: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its agent runs the command once for each point of the grid; here one of them is run, without an account."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(Path.cwd()))
    definition = yaml.safe_load((ROOT / "configs" / "sweeps" / "wandb.yaml").read_text())
    assert (ROOT / definition["program"]).exists()
    point = [f"--{key}={values['values'][-1]}" for key, values in definition["parameters"].items()]
    command = [part for word in definition["command"] for part in (point if word == "${args}" else [word])]
    assert command[:4] == ["${env}", "python", "-m", project]
    result = run(*command[4:], "--trainer.max_epochs=1", "--config", "configs/overlays/csv.yaml")
    assert result.code == 0, result.err
    with Path("runs/digits/sweep.csv").open() as file:
        (row,) = csv.DictReader(file)
    for column, key in (("batch_size", "batch_sizes"), ("factor", "rates"), ("seed", "seed_everything")):
        assert float(row[column]) == definition["parameters"][key]["values"][-1]
    assert definition["method"] == "grid"
    assert definition["metric"]["name"].removeprefix("sweep/") in row


def test_a_class_that_learns() -> None:
    """The mean that it has learnt is in its state, and is used from there."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(code_of("class Centred"), names)
    data, again = (names["Centred"](batch_size=64, seed=0) for _ in range(2))
    data.setup("fit")
    mean = data.state_dict()["learnt"]["mean"]
    again.recall({"learnt": {"mean": mean + 1}, "class_names": None})
    first, second = (
        one.to_device(one.examples("train", 2000), torch.device("cpu"), training=False).inputs for one in (data, again)
    )
    assert first.mean(0).abs().max() < 1e-5
    assert torch.allclose(second, first - 1, atol=1e-5)


def test_examples_that_are_dicts_with_their_labels() -> None:
    """The class of docs/lightning.md, which is tried on a network that takes `input_ids` alone."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(code_of("class Labelled"), names)

    class Own(torch.nn.Embedding):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids).mean(1)

    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = batchwise.Trainer(max_epochs=2, **quiet)
    trainer.fit(Classification(Own(40, 2)), names["Labelled"](batch_size=16))
    assert trainer.global_step == 6
    assert 0 <= trainer.callback_metrics["val/accuracy"] <= 1


def test_sounds_in_shards(project: str) -> None:
    """The class of docs/shards.md, on tars of three tones."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(code_of("class Sounds"), names)
    Path("sounds").mkdir()
    with tarfile.open("sounds/train-0.tar", "w") as archive:
        for number in range(3):
            file, tone = io.BytesIO(), (1000 * np.sin(np.arange(80) * (number + 1))).astype(np.int16)
            with wave.open(file, "wb") as sound:
                sound.setparams((1, 2, 8000, 80, "NONE", ""))
                sound.writeframes(tone.tobytes())
            for ending, data in (("wav", file.getvalue()), ("cls", str(number).encode())):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    assert main(project, ["shards", "sounds"]) == 0
    data = names["Sounds"]("sounds", "wav", "cls", batch_size=3, seed=0)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    (part,) = batch.micro_batches
    for sound, target in zip(part.inputs, part.targets, strict=True):
        assert torch.allclose(sound, 1000 / 2**15 * torch.sin(torch.arange(80) * (target + 1)), atol=1 / 2**15)
