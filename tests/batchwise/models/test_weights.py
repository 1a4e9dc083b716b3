"""Weights that a network begins with."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import examples
import pytest
import torch
from helpers import CSV, DIGITS, run_here
from safetensors.torch import save_file
from torch import Tensor, nn

from batchwise.models.weights import matched, take_weights


def network(outputs: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, outputs))


def plain(weights: dict[str, Tensor], path: str) -> None:
    torch.save(weights, path)


def checkpoint(weights: dict[str, Tensor], path: str) -> None:
    torch.save({"state_dict": {f"network.{name}": value for name, value in weights.items()}, "global_step": 3}, path)


def of_ddp(weights: dict[str, Tensor], path: str) -> None:
    torch.save({f"module.{name}": value for name, value in weights.items()}, path)


@pytest.mark.parametrize("save", [plain, checkpoint, of_ddp, save_file])
def test_each_kind_of_file_is_taken_by_name(save: Callable) -> None:
    saved, net = network(seed=1), network()
    path = "weights.safetensors" if save is save_file else "weights.pt"
    save(saved.state_dict(), path)
    assert take_weights(net, path) == f"weights from {path}: 8 of 8"
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), net.parameters(), strict=True))


def test_what_does_not_fit_stays_and_is_reported() -> None:
    saved, net = network(outputs=7, seed=1), network()
    before = net[2].weight.clone()
    weights = saved.state_dict()
    del weights["1.weight"]
    torch.save(weights | {"extra": torch.zeros(2)}, "weights.pt")
    assert take_weights(net, "weights.pt") == (
        "weights from weights.pt: 5 of 8; what does not fit: it lacks 1.weight; it also has extra; "
        "it has 2.weight [7, 5] for [3, 5], 2.bias [7] for [3]"
    )
    assert torch.equal(net[2].weight, before)
    assert torch.equal(net[0].weight, saved[0].weight)


def test_what_cannot_be_taken_is_one_line() -> None:
    torch.save({"other": torch.zeros(2)}, "other.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"network": network()}, "pickle.pt")
    Path("broken.pt").write_bytes(b"PK")
    for path, words in (
        ("none.pt", "none.pt does not exist"),
        ("other.pt", "other.pt holds nothing that fits model.network: it lacks 0.weight, 0.bias and 6 more"),
        ("list.pt", "list.pt holds nothing that fits"),
        ("pickle.pt", "pickle.pt cannot be read: it holds a whole module: save module.state_dict()"),
        ("broken.pt", "broken.pt cannot be read"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            take_weights(network(), path)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.slow
def test_from_one_run_into_another_and_its_resume_without_the_file() -> None:
    small = (*DIGITS, *CSV, "--model.network.hidden_features", "[8]", "--model.schedule", "{shape: constant}")
    first = run_here("fit", *small, "--trainer.max_steps", 3, "--name", "first")
    fine = (
        "fit",
        *small,
        "--data.classes",
        "[7, 3]",
        "--data.examples_per_class",
        10,
        "--model.network.num_classes",
        2,
    )
    fine = (*fine, "--model.init_from", "runs/first/*/checkpoints/last.ckpt", "--model.freeze", "['layers.[12]']")
    whole = run_here(*fine, "--name", "whole", "--trainer.max_steps", 4)
    assert whole.code == 0, whole.err
    source = first.folder.relative_to(Path.cwd()) / "checkpoints" / "last.ckpt"
    assert f"weights from {source}: 3 of 5; what does not fit: it has layers.5.weight [10, 8] for [2, 8]" in whole.out
    ours, theirs = whole.checkpoint()["state_dict"], first.checkpoint()["state_dict"]
    kept = ("network.layers.1.weight", "network.layers.2.weight", "network.layers.2.bias")
    assert all(torch.equal(ours[name], theirs[name]) for name in kept)
    run_here(*fine, "--name", "parts", "--trainer.max_steps", 2)
    for path in first.folder.glob("checkpoints/*"):
        path.unlink()
    again = run_here(*fine, "--name", "parts", "--trainer.max_steps", 4, "--ckpt_path", "last")
    assert again.code == 0, again.err
    assert "weights from" not in again.out
    assert all(torch.equal(again.checkpoint()["state_dict"][name], ours[name]) for name in ours)
    gone = run_here(*fine, "--name", "gone")
    assert gone.code == 2
    assert gone.err.splitlines()[-1].startswith("error: model.init_from runs/first/*/checkpoints/last.ckpt does not")


def test_a_network_may_be_what_a_function_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `timm.create_model` is written."""
    (tmp_path / "backbones.py").write_text(
        "from torch import nn\nfrom batchwise.models import mlp\n"
        "def create_model(model_name: str, **kwargs) -> nn.Module:\n"
        "    return getattr(mlp, model_name)(**kwargs)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    network = "{class_path: backbones.create_model, init_args: {model_name: MLP}, dict_kwargs: {hidden_features: [3]}}"
    result = run_here("fit", *DIGITS, *CSV, "--model.network", network, "--trainer.max_steps", 1)
    assert result.code == 0, result.err
    assert result.checkpoint()["state_dict"]["network.layers.1.weight"].shape == (3, 64)


class Encoder(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 5), nn.Linear(5, 5))


class Classifier(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(5, 3)


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Encoder(), Encoder()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(7, 5)
        self.last = nn.Linear(5, 7, bias=False)
        self.last.weight = self.first.weight


def renamed(module: nn.Module, *changes: tuple[str, str]) -> dict[str, Tensor]:
    """The weights of a module, with names as something that wraps it makes them."""
    weights = {}
    for name, value in module.state_dict().items():
        for pattern, new in changes:
            name = re.sub(pattern, new, name)
        weights[name] = value
    return weights


PEFT = (r"^", "base_model.model."), (r"encoder\.1\.", "encoder.1.base_layer.")
FORMS: dict[str, tuple[tuple[str, str], ...]] = {
    "as they are": (),
    "a task": ((r"^", "network."),),
    "DDP": ((r"^", "module."),),
    "a task in DDP": ((r"^", "module.network."),),
    "compiled": ((r"^", "_orig_mod."),),
    "a layer compiled": ((r"encoder\.", "encoder._orig_mod."),),
    "a compiled task": ((r"^", "network._orig_mod."),),
    "peft": PEFT,
    "peft in a task": (*PEFT, (r"^", "network.")),
    "peft, with a trained head": (*PEFT, (r"head\.", "head.modules_to_save.default.")),
    "peft, with the head it replaced": (*PEFT, (r"head\.", "head.original_module.")),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["from", "into"])
def test_what_wraps_a_network_does_not_matter(form: str, way: str) -> None:
    first = Classifier(1)
    wrapped, plain = renamed(first, *FORMS[form]), first.state_dict()
    saved, own = (wrapped, plain) if way == "from" else (plain, wrapped)
    pairs = matched(saved, own)
    assert len(pairs) == len(own)
    assert all(torch.equal(saved[source], own[name]) for name, source in pairs.items())


def test_what_peft_has_trained_counts() -> None:
    old, new = Classifier(1), Classifier(2)
    weights = renamed(old, *PEFT, (r"head\.", "head.original_module."))
    weights |= {f"base_model.model.head.modules_to_save.default.{n}": v for n, v in new.head.state_dict().items()}
    torch.save(weights | {"base_model.model.encoder.1.lora_A.default.weight": torch.zeros(2)}, "peft.pt")
    net = Classifier()
    report = take_weights(net, "peft.pt")
    assert report.startswith(
        "weights from peft.pt: 6 of 6; what does not fit: it also has base_model.model.head.original"
    )
    assert report.endswith("and 1 more")
    assert torch.equal(net.head.weight, new.head.weight)
    assert torch.equal(net.encoder[1].weight, old.encoder[1].weight)  # type: ignore[arg-type]


def test_a_part_of_a_network() -> None:
    torch.save(Encoder().state_dict(), "part.pt")
    torch.save(Classifier(1).state_dict(), "whole.pt")
    assert take_weights(Classifier(), "part.pt").startswith("weights from part.pt: 4 of 6; what does not fit: it lacks")
    assert take_weights(Encoder(), "whole.pt").startswith("weights from whole.pt: 4 of 4; what does not fit: it also")
    for net, path in ((Twins(), "part.pt"), (Encoder(), "twins.pt")):
        torch.save(Twins().state_dict(), "twins.pt")
        with pytest.raises(ValueError, match=f"model.init_from {path}: it fits left and right alike: rename"):
            take_weights(net, path)


def test_names_that_mean_two_weights_are_refused() -> None:
    own = Classifier().state_dict()
    saved = {"network._orig_mod.head.base_layer.bias": torch.zeros(3), "head.base_layer.bias": torch.ones(3)}
    with pytest.raises(ValueError, match=r"head\.base_layer\.bias may both be head\.bias: rename one"):
        matched(saved, own)


def under(start: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {start + name: value for name, value in weights.items()}


@pytest.mark.parametrize(
    "starts", [("network.", "module."), ("_orig_mod.", "network."), ("module.", "module.network.")]
)
def test_two_weights_for_one_name_are_refused(starts: tuple[str, str]) -> None:
    first, second = (network(seed=seed).state_dict() for seed in (1, 2))
    torch.save(under(starts[0], first) | under(starts[1], second), "two.pt")
    words = f"model.init_from two.pt: {starts[0]}0.weight and {starts[1]}0.weight may both be 0.weight: rename one"
    with pytest.raises(ValueError, match=re.escape(words)):
        take_weights(network(), "two.pt")
    torch.save(under(starts[0], first) | under(starts[1], first), "same.pt")  # it does not matter which is taken
    assert take_weights(network(), "same.pt").startswith("weights from same.pt: 8 of 8")
    torch.save(under(starts[0], first) | second, "exact.pt")
    net = network()
    take_weights(net, "exact.pt")
    assert torch.equal(net.state_dict()["0.weight"], second["0.weight"])


class Wrapping(nn.Module):
    """Its own parts have the names of wrappers."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.network, self.module, self.weight = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))


@pytest.mark.parametrize("form", ["as they are", "a task", "DDP", "a task in DDP", "compiled", "a compiled task"])
def test_parts_that_are_named_as_wrappers_get_their_own_weights(form: str) -> None:
    wrapped = renamed(Wrapping(1), *FORMS[form])
    plain = Wrapping(1).state_dict()
    for saved, own in ((wrapped, plain), (plain, wrapped)):
        pairs = matched(saved, own)
        assert len(pairs) == 5
        assert all(torch.equal(saved[source], own[name]) for name, source in pairs.items())
    with pytest.raises(ValueError, match=r"weight may be network\.weight or module\.weight: rename it"):
        matched({"weight": torch.zeros(4, 4)}, {n: v for n, v in plain.items() if n != "weight"})


def test_what_peft_has_replaced_stays() -> None:
    """A checkpoint without frozen parameters has the head that learns, but not the one it replaced."""
    head = Classifier().head.state_dict()
    trained, replaced = ({f"head.{kind}.{name}": value for name, value in head.items()} for kind in (
        "modules_to_save.default", "original_module"
    ))  # fmt: skip
    assert matched(trained, trained | replaced).keys() == trained.keys()
    assert len(matched({f"head.{name}": value for name, value in head.items()}, trained | replaced)) == 4


def test_the_page_writes_a_network_for_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    project = examples.load("bert")
    monkeypatch.setitem(sys.modules, "project.bert", project)
    trained = project.bert()
    folder = Path("runs/bert/now/checkpoints")
    folder.mkdir(parents=True)
    torch.save(
        {"state_dict": {f"network.{name}": value for name, value in trained.state_dict().items()}}, folder / "best.ckpt"
    )
    (code,) = re.findall(r"```python\n(.*?)```", (examples.DOCS / "fine-tuning.md").read_text(), re.DOTALL)
    exec(code, {})
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained("my-bert").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in trained.state_dict().items())


def test_names_that_no_weight_needs_may_be_ambiguous() -> None:
    """A peft model with two adapters has two heads, and each goes to itself."""
    head = Classifier().head.state_dict()
    saved = {
        f"head.modules_to_save.{one}.{name}": value + len(one) for one in ("a", "bc") for name, value in head.items()
    }
    assert matched(saved, saved) == {name: name for name in saved}
    with pytest.raises(
        ValueError, match=r"head\.modules_to_save\.a\.weight and head\.modules_to_save\.bc\.weight may both"
    ):
        matched(saved, {f"head.{name}": value for name, value in head.items()})


def test_tied_weights_are_saved_once() -> None:
    weights = Tied().state_dict()
    del weights["last.weight"]
    save_file(weights, "tied.safetensors")
    net = Tied()
    assert take_weights(net, "tied.safetensors") == "weights from tied.safetensors: 2 of 2"
    assert torch.equal(net.last.weight, weights["first.weight"])


def test_a_folder_of_hugging_face(tmp_path: Path) -> None:
    names = list(Classifier(1).state_dict())
    weights, folder = Classifier(1).state_dict(), tmp_path / "shards"
    folder.mkdir()
    parts = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for part, some in parts.items():
        save_file({name: weights[name] for name in some}, folder / part)
    index = {"weight_map": {name: part for part, some in parts.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    one = tmp_path / "one"
    one.mkdir()
    save_file(weights, one / "model.safetensors")
    for path in (folder, folder / "model.safetensors.index.json", one):
        net = Classifier()
        assert take_weights(net, str(path)) == f"weights from {path}: 6 of 6"
        assert torch.equal(net.head.weight, weights["head.weight"])
    with pytest.raises(ValueError, match=r"is a folder without weights: write one that has model\.safetensors"):
        take_weights(Classifier(), str(tmp_path))
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be read: .*b\.safetensors"):
        take_weights(Classifier(), str(folder))


def test_two_values_of_one_weight_are_refused() -> None:
    torch.save({"first.weight": torch.zeros(7, 5), "last.weight": torch.ones(7, 5)}, "untied.pt")
    with pytest.raises(
        ValueError, match=r"last\.weight and first\.weight are one weight in model\.network, and differ"
    ):
        take_weights(Tied(), "untied.pt")
    torch.save({"first.weight": torch.ones(7, 5), "last.weight": torch.ones(7, 5)}, "alike.pt")
    assert take_weights(Tied(), "alike.pt") == "weights from alike.pt: 2 of 2"


@pytest.mark.parametrize("kind", [torch.int8, torch.complex64])
def test_weights_that_are_no_real_numbers_are_refused(kind: torch.dtype) -> None:
    net = nn.Linear(3, 2)
    torch.save({name: value.to(kind) for name, value in net.state_dict().items()}, "odd.pt")
    name = str(kind).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"model.init_from odd.pt has weight as {name}: save it as floating-point"):
        take_weights(net, "odd.pt")


def test_a_folder_of_several_old_files() -> None:
    Path("old").mkdir()
    for name in ("weight", "bias"):
        torch.save({name: torch.ones(2, 3) if name == "weight" else torch.ones(2)}, f"old/{name}.bin")
    index = {"weight_map": {"weight": "weight.bin", "bias": "bias.bin"}}
    Path("old/pytorch_model.bin.index.json").write_text(json.dumps(index))
    net = nn.Linear(3, 2)
    assert take_weights(net, "old") == "weights from old: 2 of 2"
    assert torch.equal(net.weight, torch.ones(2, 3))
