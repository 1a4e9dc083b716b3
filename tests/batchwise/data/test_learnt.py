"""What training has learnt from its data is in the checkpoint, and is used from there."""

import csv
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import CSV, Result, run_here
from PIL import Image
from small import Classify, Points, adamw, fit, furthest, network, trainer
from torch import Tensor

from batchwise.callbacks.checkpoint import Last
from batchwise.data.labels import check_alike, label_numbers, shown, sorted_labels
from batchwise.data.learnt import plain, same
from batchwise.data.mixture import Mixture
from batchwise.errors import Mistake
from batchwise.sources.digits import Digits
from batchwise.sources.folder import Folder
from batchwise.sources.hub import Hub
from batchwise.sources.shards import Shards
from batchwise.sources.table import Table
from batchwise.sources.text import Text
from batchwise.tasks.classification import Classification

# In Python


class Centred(Points):
    """Learns a mean and says how often."""

    shift = 0.0
    calls = 0

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        x, y = super().load(split)
        return x + self.shift, y

    def learn(self) -> dict[str, Any]:
        type(self).calls += 1
        return {"mean": (self.x + self.shift).mean(0)}

    def transform(self, batch: Any, training: bool) -> Any:
        batch.inputs = batch.inputs - self.learnt["mean"].to(batch.inputs)
        return batch


class Shifted(Centred):
    shift = 3.0


class Named(Points):
    class_names: ClassVar = ["a", "b", "c"]


def train(data: Points, **settings: Any) -> Any:
    more: dict[str, Any] = {"callbacks": [Last()], "enable_checkpointing": True, "max_steps": 5}
    return fit(Classify(network(), optimizer=adamw), data, **(more | settings))


LAST = "checkpoints/last.ckpt"


def renamed(data: Any, name: str) -> Any:
    """A checkpoint keeps the state of a data module under the name of its class."""
    data.__class__ = type(name, (type(data),), {"__qualname__": name})
    return data


def test_it_is_in_the_checkpoint_and_is_used_from_there() -> None:
    train(Centred())
    state = torch.load(LAST, weights_only=True)["Centred"]
    torch.testing.assert_close(state["learnt"]["mean"], Points().x.mean(0))
    found = {}
    for name, data in (("same", Centred()), ("other", renamed(Shifted(), "Centred"))):
        data.calls = 0
        trainer().test(Classify(network()), data, LAST, verbose=False)
        assert data.recalled
        found[name] = data.learnt["mean"]
        assert data.calls == 0
    assert torch.equal(found["same"], found["other"])
    trainer().test(Classify(network()), data, verbose=False)  # without a checkpoint it is learnt anew
    assert not data.recalled
    torch.testing.assert_close(data.learnt["mean"], Points().x.mean(0) + 3)


def test_a_resume_on_other_data_is_refused() -> None:
    train(Centred())
    train(Centred(), ckpt_path=LAST, max_steps=6)
    words = r"trained on other data: it has learnt mean \[.*\], and the training examples now give \[.*\]: use the same"
    with pytest.raises(ValueError, match=words):
        train(renamed(Shifted(), "Centred"), ckpt_path=LAST, max_steps=7)


def test_names_of_classes_are_compared() -> None:
    train(Named())
    other = renamed(Named(), "Named")
    other.class_names = ["a", "c", "b"]
    with pytest.raises(ValueError, match="trained with the classes a, b, c, and Named now has a, c, b"):
        trainer().test(Classify(network()), other, LAST, verbose=False)


class Scaled(Shifted):
    """Uses what training has not learnt."""

    def transform(self, batch: Any, training: bool) -> Any:
        batch.inputs = batch.inputs / self.learnt["std"]
        return batch


def test_a_data_module_whose_class_has_another_name_now() -> None:
    """It was a new one: an evaluation learnt anew, from examples that may have changed."""
    whole, _ = train(Centred(), max_steps=10)
    train(Centred())
    data = renamed(Shifted(), "Moved")
    trainer().test(Classify(network()), data, LAST, verbose=False)
    torch.testing.assert_close(data.learnt["mean"], Points().x.mean(0))
    content = torch.load(LAST, weights_only=True)
    content["Centred"]["micro_batch_limit"] = 2
    torch.save(content, "limited.ckpt")
    data = renamed(Centred(), "Moved")
    task, _ = fit(Classify(network(), optimizer=adamw), data, "limited.ckpt", max_steps=10)
    assert furthest(task, whole) < 1e-12
    assert data.micro_batch_limit == 2
    with pytest.raises(ValueError, match="it has learnt mean"):
        fit(Classify(network(), optimizer=adamw), Shifted(), LAST, max_steps=10)


def test_another_source_does_not_use_what_a_folder_has_learnt() -> None:
    """Each scales images in a way of its own, and both have learnt classes."""
    pictures("photos", {"cat": 40, "dog": 180})
    data = Folder("photos", size=8, batch_size=4)
    data.load("train")
    for other in (Shards("shards", "image", batch_size=4), Hub("photos", "image", batch_size=4)):
        with pytest.raises(
            Mistake, match=r"was trained with the data module Folder, and .* in another way: use Folder"
        ):
            other.recall(data.state_dict())
    Folder("photos", size=8, batch_size=4).recall(data.state_dict())


class Rotated(Folder):
    def learn(self) -> dict[str, Any]:
        return super().learn()


def test_a_data_module_of_the_user_may_use_what_one_of_the_engine_has_learnt() -> None:
    """Such as one that reads a test set of its own in the way of training."""
    pictures("photos", {"cat": 40, "dog": 180})
    data = Folder("photos", size=8, batch_size=4)
    data.load("train")
    for own in (Rotated("photos", size=8, batch_size=4), Points()):
        own.recall(data.state_dict())
        assert own.learnt == data.learnt
    state = Rotated("photos", size=8, batch_size=4).state_dict()
    with pytest.raises(Mistake, match="was trained with the data module Rotated, and Folder reads or scales its"):
        data.recall(state)


@pytest.mark.parametrize(
    ("settings", "change"),
    [({"split_seed": 1}, "data.split_seed: 0 -> 1"), ({"val_fraction": 0.2}, "data.val_fraction: 0.15 -> 0.2")],
)
def test_a_test_split_that_training_may_have_seen_is_warned_of(settings: dict[str, Any], change: str) -> None:
    data = Digits(batch_size=4)
    data.setup("test")
    other = Digits(batch_size=4, **settings)
    other.recall(data.state_dict())
    with pytest.warns(UserWarning, match=f"the test split may have examples that were trained on, .* \\({change}\\)"):
        other.setup("test")


def test_texts_that_are_divided_otherwise() -> None:
    rows("texts.csv", ["text"], [[f"text {number}"] for number in range(40)])
    data = Text("texts.csv", batch_size=4)
    data.setup("test")
    other = Text("texts.csv", batch_size=4, split_seed=1)
    other.recall(data.state_dict())
    with pytest.warns(UserWarning, match=r"the test split may have .* \(data.split_seed: 0 -> 1\): use the same data"):
        other.setup("test")


def test_more_rows_divide_a_table_otherwise() -> None:
    pytest.importorskip("pyarrow")
    rows("rows.csv", ["x", "k"], [[number, "ab"[number % 2]] for number in range(40)])
    data = Table("rows.csv", "k", batch_size=4)
    data.setup("fit")
    state, again = data.state_dict(), Table("rows.csv", "k", batch_size=4)
    again.recall(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.setup("test")
    rows("rows.csv", ["x", "k"], [[number, "ab"[number % 2]] for number in range(41)])
    for stage, split in (("test", "test"), ("validate", "val")):
        more = Table("rows.csv", "k", batch_size=4)
        more.recall(state)
        with pytest.warns(
            UserWarning, match=f"the {split} split may have .* otherwise \\(examples: 40 -> 41, checksum"
        ):
            more.setup(stage)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it is said once
            more.setup(stage)


def test_what_the_checkpoint_has_not_learnt_is_named() -> None:
    train(Centred())
    with pytest.raises(Mistake, match="the checkpoint has learnt no 'std', but mean: use the data module with which"):
        trainer().test(Classify(network()), Scaled(), LAST, verbose=False)


def test_a_checkpoint_without_it_is_said_to_be_old() -> None:
    train(Centred())
    content = torch.load(LAST, weights_only=True)
    del content["Centred"]["learnt"]
    torch.save(content, "old.ckpt")
    with pytest.warns(UserWarning, match="older version, without what training has learnt"):
        trainer().test(Classify(network()), Centred(), "old.ckpt", verbose=False)


def test_plain_types() -> None:
    given = {"a": np.float64(1.5), "b": (1, "x", None, True), "c": np.arange(3), "d": {"e": torch.ones(2)}}
    made = plain(given, "it")
    torch.save(made, "plain.pt")
    assert same(torch.load("plain.pt", weights_only=True), made)
    assert type(made["a"]) is float
    with pytest.raises(ValueError, match=r"it\['x'\]\[0\] is a set: write numbers"):
        plain({"x": [set()]}, "it")
    assert not same({"a": [1.0]}, {"a": [1.1]})
    assert not same([1], ["1"])
    assert same([float("nan")], [float("nan")])
    assert same(torch.ones(2), torch.ones(2) + 1e-7)
    assert not same(torch.ones(2), torch.ones(3))
    assert shown(["cat", "dog"]) == "cat, dog"
    assert shown([1.0, 2.5]) == "[1, 2.5]"


ORDERS = {
    ("b", "a"): ["a", "b"],
    ("10", "9", "1"): ["1", "9", "10"],
    ("1", "01", "001", "2"): ["001", "01", "1", "2"],
    ("02", "1"): ["1", "02"],
    ("a", "1", "01"): ["01", "1", "a"],
    ("B", "a"): ["B", "a"],
    ("1.5", "-1"): ["-1", "1.5"],
    ("٣", "1"): ["1", "٣"],
    ("é", "e"): ["e", "é"],
    (): [],
}


@pytest.mark.parametrize("labels", ORDERS, ids=str)
def test_the_order_of_labels(labels: tuple[str, ...]) -> None:
    assert sorted_labels(labels) == ORDERS[labels]
    assert sorted_labels(reversed(labels)) == ORDERS[labels]


@pytest.mark.weekly
def test_the_order_does_not_depend_on_the_interpreter() -> None:
    code = "from batchwise.data.labels import sorted_labels; print(sorted_labels(['1', '01', '001', '2', '02', '10']))"
    src = str(Path(__file__).parents[3] / "src")
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": src},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(said) == 1


def test_labels_that_unicode_writes_in_two_ways_are_one() -> None:
    """macOS gives files names in which an accent is a character of its own."""
    one, other = "Caf\u00e9", "Cafe\u0301"
    assert sorted_labels([one, "b", other]) == sorted_labels([other, "b"]) == [one, "b"]
    for known in ([one, "b"], [other, "b"]):
        assert label_numbers(["b", one, other], known, "it").tolist() == [1, 0, 0]
    check_alike([one, other, "b"], "it")
    with pytest.raises(ValueError, match="it has the labels 'CAFÉ' and 'Café', which look like one"):
        check_alike([one.upper(), other], "it")


def test_a_whole_number_with_a_point_is_no_other_label() -> None:
    check_alike(["1", "2", "1.5", "v1.0"], "it")
    for one in ("1", "-1"):
        with pytest.raises(
            ValueError, match=f"it has the labels '{one}' and '{one}.0', which look like one: give both"
        ):
            check_alike([one, f"{one}.0", "2"], "it")


def test_numbers_of_labels() -> None:
    assert label_numbers(["b", "a", "b"], ["a", "b"], "it").tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="it has the labels zebra, which training has not seen: it knows a, b"):
        label_numbers(["a", "zebra"], ["a", "b"], "it")


def test_more_outputs_than_classes() -> None:
    class Two(Named):
        class_names: ClassVar = ["a", "b"]

        def load(self, split: str) -> tuple[Tensor, Tensor]:
            x, y = super().load(split)
            return x, y.clamp(max=1)

    task = Classification(network(), optimizer=adamw)
    with pytest.warns(UserWarning, match="has 3 outputs for 2 classes: write num_classes 2, unless more are to come"):
        fit(task, Two(), max_steps=1)


# Folders and tables, on the command line


def pictures(folder: str, levels: dict[str, int], count: int = 12) -> None:
    generator = np.random.default_rng(0)
    for label, level in levels.items():
        (Path(folder) / label).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = generator.integers(level, level + 40, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{folder}/{label}/{number}.png")


def rows(path: str, names: list[str], values: list[list[Any]]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([names, *values])


CLASSIFY = ("--model", "batchwise.tasks.classification.Classification", "--model.network", "batchwise.models.mlp.MLP")
FOLDER = (
    *("--data", "batchwise.sources.folder.Folder", "--data.path", "photos", "--data.size", 8, "--data.batch_size", 8),
    *(*CLASSIFY, "--model.network.in_features", 192, "--model.network.num_classes", 2),
    *("--model.network.hidden_features", "[8]", "--model.optimizer.lr", 0.01, "--trainer.accelerator", "cpu"),
)


def done(*arguments: object) -> Result:
    result = run_here(*arguments)
    assert result.code == 0, result.err
    return result


def refused(*arguments: object) -> str:
    result = run_here(*arguments)
    assert result.code == 2, result.out
    return next(line for line in result.err.splitlines() if line.startswith("error:"))


@pytest.mark.slow
def test_a_folder_that_has_changed_since() -> None:
    pictures("photos", {"cat": 40, "dog": 180})
    pictures("new", {"": 60}, 5)
    done("fit", *FOLDER, *CSV, "--name", "pets", "--trainer.max_epochs", 3)
    predict = ("predict", *FOLDER, "--name", "pets", "--ckpt_path", "last", "--data.predict_path", "new")
    done(*predict, "--predictions", "./before.csv")
    assert "cat" in Path("before.csv").read_text()
    test = ("test", *FOLDER, *CSV, "--name", "pets", "--ckpt_path", "last")
    fits = ("fit", *FOLDER, *CSV, "--name", "pets", "--ckpt_path", "last", "--trainer.max_epochs", 4)
    # Darker images change no prediction, and a resume is refused.
    shutil.move("photos", "bright")
    pictures("photos", {"cat": 0, "dog": 100})
    done(*predict, "--predictions", "./darker.csv")
    assert "trained on other data: it has learnt mean[0] " in refused(*fits)
    # A class is renamed, and one is added.
    shutil.rmtree("photos")
    shutil.copytree("bright", "photos")
    shutil.move("photos/cat", "photos/zebra")
    line = "data.path photos has the labels zebra, which training has not seen: it knows cat, dog"
    assert line in refused(*test)
    assert line in refused(*fits)
    done(*predict, "--predictions", "./renamed.csv")
    pictures("photos", {"ant": 100})
    done(*predict, "--predictions", "./added.csv")
    # The training data is gone.
    shutil.rmtree("photos")
    done(*predict, "--predictions", "./gone.csv")
    texts = {name: Path(f"{name}.csv").read_bytes() for name in ("before", "darker", "renamed", "added", "gone")}
    assert len(set(texts.values())) == 1


@pytest.mark.slow
def test_a_test_folder_may_lack_a_class_and_the_training_images() -> None:
    pictures("photos/train", {"cat": 40, "dog": 180})
    pictures("photos/test", {"dog": 180})
    done("fit", *FOLDER, *CSV, "--name", "pets", "--trainer.max_epochs", 20)
    shutil.rmtree("photos/train")
    result = done("test", *FOLDER, *CSV, "--name", "pets", "--ckpt_path", "last")
    assert "test/accuracy 1.0000" in result.out


@pytest.mark.slow
def test_a_table_that_is_gone() -> None:
    generator = np.random.default_rng(0)
    people = [[i, 20 + i % 50, "abc"[i % 3], ("no", "yes")[int(generator.random() < 0.5)]] for i in range(60)]
    rows("people.csv", ["id", "age", "town", "answer"], people)
    rows("new.csv", ["town", "age", "id"], [["b", 33, 1], ["zzz", 40, 2], ["", 20, 3]])
    table = (
        *("--data", "batchwise.sources.table.Table", "--data.path", "people.csv", "--data.target", "answer"),
        *("--data.columns", "{id: ignore}", "--data.batch_size", 8, *CLASSIFY, "--model.network.in_features", 4),
        *("--model.network.num_classes", 2, "--trainer.accelerator", "cpu"),
    )
    done("fit", *table, *CSV, "--name", "people", "--trainer.max_epochs", 2)
    predict = ("predict", *table, "--name", "people", "--ckpt_path", "last", "--data.predict_path", "new.csv")
    done(*predict, "--predictions", "./before.csv")
    rows("people.csv", ["id", "age", "town", "answer"], [[*row[:3], row[3].upper()] for row in people])
    assert "has the labels NO, YES, which training has not seen: it knows no, yes" in refused(
        "test", *table, *CSV, "--name", "people", "--ckpt_path", "last"
    )
    rows("people.csv", ["id", "age", "town", "answer"], [[row[0], 2 * row[1], *row[2:]] for row in people])
    assert "trained on other data: it has learnt columns" in refused(
        "fit", *table, *CSV, "--name", "people", "--ckpt_path", "last", "--trainer.max_epochs", 3
    )
    Path("people.csv").unlink()
    done(*predict, "--predictions", "./after.csv")
    assert Path("before.csv").read_bytes() == Path("after.csv").read_bytes()


@pytest.mark.weekly
def test_predictions_replace_no_other_file() -> None:
    pictures("photos", {"cat": 40, "dog": 180})
    images = [[f"photos/{label}/{number}.png", label] for label in ("cat", "dog") for number in range(12)]
    rows("list.csv", ["path", "label"], images)
    rows("example.csv", ["example", "path", "label"], [[n, *row] for n, row in enumerate(images)])
    settings = (*FOLDER[:3], "list.csv", *FOLDER[4:], "--model.network.num_classes", 5)
    done("fit", *settings, *CSV, "--name", "pets", "--trainer.max_epochs", 1)
    predict = ("predict", *settings, "--name", "pets", "--ckpt_path", "last", "--predictions")
    Path("notes.csv").write_text("mine\n1\n")
    Path("notes.parquet").write_text("mine")
    Path("empty.csv").touch()
    Path("folder.csv").mkdir()
    before = {path.name: path.read_bytes() for path in Path().glob("*.csv") if path.is_file()}
    for name, words in (
        ("./list.csv", "list.csv is an input of this run: write another name"),
        ("photos/../list.csv", "is an input of this run"),
        ("./notes.csv", "notes.csv exists, and predict did not write it: write another name, or --force true"),
        ("./notes.parquet", "notes.parquet exists, and predict did not write it"),
        ("./empty.csv", "empty.csv exists, and predict did not write it"),
        ("./folder.csv", "folder.csv is a folder"),
    ):
        assert words in refused(*predict, name), name
    assert "is an input of this run" in refused(*predict, "./list.csv", "--force", "true")
    assert before == {path.name: path.read_bytes() for path in Path().glob("*.csv") if path.is_file()}
    for name in ("./new.csv", "./new.csv", "./new.parquet", "./new.parquet", "predictions.csv", "predictions.csv"):
        done(*predict, name)
    done(*predict, "./notes.csv", "--force", "true")
    assert Path("notes.csv").read_bytes() == Path("new.csv").read_bytes()


@pytest.mark.parametrize("vocabulary", ["bytes", "characters"])
def test_texts_with_other_labels_or_characters_are_refused(vocabulary: str) -> None:
    from batchwise.sources.text import Text

    texts = [[f"{'good' if n % 2 else 'bad'} number {n}", ("no", "yes")[n % 2]] for n in range(60)]
    rows("texts.csv", ["text", "label"], texts)

    def data() -> Text:
        return Text("texts.csv", vocabulary, label_column="label", val_fraction=0.2, test_fraction=0.2, batch_size=8)

    first = data()
    first.setup("fit")
    state = first.state_dict()
    torch.save(state["learnt"], "learnt.pt")
    again = data()
    again.recall({"learnt": torch.load("learnt.pt", weights_only=True), "class_names": state["class_names"]})
    again.setup("test")
    assert again.class_names == ["no", "yes"]
    changed = [[text.replace("o", "ö"), label] for text, label in texts]
    for now in ([[text, label.upper()] for text, label in texts], changed if vocabulary == "characters" else None):
        if now is not None:
            rows("texts.csv", ["text", "label"], now)
            other = data()
            other.recall(state)
            with pytest.raises(ValueError, match=r"training has learnt from its texts: .*; and data.files now give: "):
                other.setup("test")


def mixture(*shifts: float) -> Mixture:
    modules = {name: Centred() for name in ("one", "two")}
    for module, shift in zip(modules.values(), shifts, strict=True):
        module.batch_size = None
        module.shift = shift
    return Mixture(modules, {"one": 1, "two": 1}, batch_size=10, seed=3)


def test_a_mixture_keeps_what_each_module_has_learnt() -> None:
    train(mixture(0.0, 1.0))  # type: ignore[arg-type]
    state = torch.load(LAST, weights_only=True)["Mixture"]["learnt"]
    assert same(state["two"]["mean"], state["one"]["mean"] + 1)
    data = mixture(5.0, 5.0)
    trainer().test(Classify(network()), data, LAST, verbose=False)
    for name, module in data.modules.items():
        assert same(module.learnt["mean"], state[name]["mean"])  # type: ignore[attr-defined]
    train(mixture(0.0, 1.0), ckpt_path=LAST, max_steps=6)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"trained on other data: it has learnt two\['mean'\] "):
        train(mixture(0.0, 2.0), ckpt_path=LAST, max_steps=7)  # type: ignore[arg-type]


def test_a_data_module_that_is_used_again_loads_by_what_it_now_knows() -> None:
    pictures("photos/train", {"cat": 40, "dog": 180}, 4)
    pictures("photos/test", {"cat": 40, "dog": 180}, 2)
    data = Folder("photos", size=4, batch_size=2, val_fraction=0)
    data.setup("fit")
    state = data.state_dict()
    data.setup("test")
    before = data.examples("test", 4).targets.tolist()
    assert before == [0, 0, 1, 1]
    first = data.split("test")
    data.recall(state)  # the same: nothing is loaded again
    assert data.split("test") is first
    data.recall({"learnt": state["learnt"] | {"classes": ["dog", "cat"]}, "class_names": ["dog", "cat"]})
    data.setup("test")
    assert data.examples("test", 4).targets.tolist() == [1, 1, 0, 0]
    data.recall(None)
    assert data.examples("test", 4).targets.tolist() == before
