"""Files of weights as people have them: what is around the weights, and what no network can take."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchwise.checkpoints import unreadable
from batchwise.models.weights import take_weights

OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}


def weights(value: float) -> dict[str, Tensor]:
    return {"weight": torch.full((2, 3), value), "bias": torch.full((2,), value)}


@pytest.mark.parametrize(
    "around",
    [
        lambda some: {"model": some, "optimizer": OPTIMIZER, "epoch": 3},
        lambda some: {"optimizer_state_dict": OPTIMIZER, "model_state_dict": some, "loss": torch.ones(())},
        lambda some: {"net": {f"module.{name}": value for name, value in some.items()}, "acc": 0.9},
        lambda some: {"epoch": 3, "ema": {"module": some}},
        lambda some: {"state_dict": some, "state_dict_ema": weights(2)},
        lambda some: {"model": some, "ema": weights(2)},
        lambda some: {"model": {"name": "linear"}, "model_state_dict": some},
        lambda some: some | {"_extra_state": {"scale": torch.ones(2)}},
    ],
)
def test_what_is_around_the_weights_does_not_matter(around: Callable[[dict], dict]) -> None:
    torch.save(around(weights(1)), "around.pt")
    net = nn.Linear(3, 2)
    assert take_weights(net, "around.pt").startswith("weights from around.pt: 2 of 2")
    assert torch.equal(net.weight, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"teacher": weights(1), "student": weights(2)}, "has weights in 'teacher' and in 'student': save one of them"),
        ({"state_dict": None}, "has a state_dict that is NoneType, and no weights by name: save module.state_dict()"),
        ({"state_dict": {0: torch.ones(2)}}, "has a weight of the name 0, which is no text: save module.state_dict()"),
        ({"weight": torch.ones(2, 3).to_sparse()}, "has weight, which is sparse, quantized or without values: save it"),
        ({"weight": torch.ones(2, 3, device="meta")}, "has weight, which is sparse, quantized or without values"),
        ({"weight": torch.tensor([[0, 0, float("nan")]] * 2)}, "has NaN or infinite values in weight: write a file"),
        ({"bias": torch.tensor([0, float("inf")])}, "has NaN or infinite values in bias: write a file from before"),
        (nn.Linear(3, 2), "cannot be read: it holds a whole module: save module.state_dict()"),
        ({"print": print}, "cannot be read: it holds code, or objects other than tensors and plain types: save module"),
    ],
    ids=["two sets", "none", "numbers", "sparse", "meta", "NaN", "infinite", "module", "code"],
)
def test_what_no_network_can_take_is_one_line(content: Any, words: str) -> None:
    torch.save(content, "odd.pt")
    net = nn.Linear(3, 2)
    before = net.weight.clone()
    with pytest.raises(ValueError, match=re.escape(f"model.init_from odd.pt {words}")) as error:
        take_weights(net, "odd.pt")
    assert len(str(error.value).splitlines()) == 1
    assert "weights_only" not in str(error.value)
    assert "\x1b" not in str(error.value)
    assert torch.equal(net.weight, before)


def test_what_is_no_file_of_weights_says_so() -> None:
    for text in ("epoch,loss\n1,2\n", ""):
        Path("log.csv").write_text(text)
        with pytest.raises(ValueError, match=r"log\.csv cannot be read: it is no file that torch.save has written"):
            take_weights(nn.Linear(3, 2), "log.csv")
        assert unreadable(Path("log.csv")) == "it is no file that torch.save has written"
    Path("a.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a\.index\.json cannot be read: it has no weight_map"):
        take_weights(nn.Linear(3, 2), "a.index.json")


def test_a_mask_may_have_infinite_values() -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.register_buffer("mask", torch.tensor([0, -torch.inf]))

    torch.save(Masked().state_dict(), "masked.pt")
    assert take_weights(Masked(), "masked.pt") == "weights from masked.pt: 3 of 3"
