"""What a step on a GPU waits for: nothing, or what is named here. On a stand-in, which counts each wait.

`tests/batchwise/gpu/test_waiting.py` asks a GPU itself.
"""

from functools import partial
from itertools import pairwise

import examples
import pytest
import small
import standin
import torch
from torch.optim import AdamW

from batchwise.batching import device
from batchwise.data import examples as reading
from batchwise.data.augment import Affine, ColourJitter, CutOut, Flip, ShiftCrop
from batchwise.data.mixing import CutMix, MixUp
from batchwise.loop import BatchOptimization
from batchwise.models.mlp import MLP
from batchwise.sources.digits import Digits
from batchwise.tasks import step, trying
from batchwise.tasks.classification import Classification

MICRO = 4  # micro-batches in a batch of 13, of at most 4 examples
WAITS = {
    "distil": 1,  # for whether the step is skipped, because it logs a value of its own
    "gan": 2,  # the same, for each player
    "halves": 1,  # for whether all examples of the batch count
    "bert": MICRO,  # in transformers, which looks at the mask
    "lora": MICRO,
}
AUGMENTATIONS = {
    "Flip": [Flip()],
    "ShiftCrop": [ShiftCrop(1)],
    "CutOut": [CutOut(2)],
    "ColourJitter": [ColourJitter(0.2, 0.2)],
    "Affine": [Affine(10)],
    "MixUp": [MixUp(10)],
    "CutMix": [CutMix(10)],
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Let the stand-in take tensors while the host goes on, and decide by itself whether a step is skipped."""
    monkeypatch.setattr(device, "GO_ON", ("mps",))
    monkeypatch.setattr(step, "DEVICES", ("mps",))
    monkeypatch.setattr(examples, "adamw", partial(AdamW, lr=0.001, fused=True))


def waits(task, data, **settings):
    """Return how often the second and the third step wait: a set, of one number where they wait alike."""
    counts, original = [], BatchOptimization.step

    def counted(*arguments):
        counts.append(len(standin.WAITS) + len(standin.SENT))
        original(*arguments)

    few = {"max_steps": 4, "max_epochs": -1, "limit_val_batches": 0, "log_every_n_steps": 1000}
    with standin.mps(float64=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchOptimization, "step", counted)
        small.trainer(accelerator="auto", devices=1, precision="32-true", **few, **settings).fit(task, data)
    return {after - before for before, after in pairwise(counts[1:])}


@pytest.mark.parametrize("name", standin.EXAMPLES)
@pytest.mark.slow
def test_an_example_waits_for_no_more_than_is_named(name, as_on_a_gpu):
    assert waits(*examples.make(name, MICRO)) == {WAITS.get(name, 0)}


def digits(**settings):
    torch.manual_seed(1)
    task = Classification(MLP(64, 10, (16,)), optimizer=examples.adamw)
    return task, Digits(batch_size=13, micro_batch_size=MICRO, seed=0, **settings)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.slow
def test_augmentations_wait_for_nothing(name, as_on_a_gpu):
    assert waits(*digits(augment=AUGMENTATIONS[name])) == {0}


@pytest.mark.parametrize("clip", [None, 0.1])
def test_clipping_waits_for_nothing(clip, as_on_a_gpu):
    assert waits(*digits(), gradient_clip_val=clip) == {0}


class Weighted(small.Classify):
    """The weights are made on the host."""

    def losses(self, batch):
        return small.Classify.losses(self, batch), torch.ones(len(batch)).double()


class OfTerms(small.Classify):
    def losses(self, batch):
        return {"one": super().losses(batch), "other": Weighted.losses(self, batch)}


@pytest.mark.parametrize("kind", [Weighted, OfTerms])
def test_weights_from_the_host_are_those_from_the_device(kind):
    host, settings = small.fit(kind(small.network(), optimizer=small.adamw))[0], {"accelerator": "auto", "devices": 1}
    with standin.mps(float64=True), pytest.MonkeyPatch.context() as patch:
        for module in (device, reading, trying):
            patch.setattr(module, "has_float64", lambda _: True)
        there, _ = small.fit(kind(small.network(), optimizer=small.adamw), **settings)
        assert small.furthest(there.cpu(), host) < 1e-12


@pytest.mark.slow
def test_what_waits_is_seen(as_on_a_gpu, monkeypatch):
    """So that the tests above can fail."""
    monkeypatch.setattr(device, "GO_ON", ())
    sent = 2 * MICRO  # inputs and targets
    assert waits(*digits()) == {sent}
    assert waits(*digits(augment=[Flip()])) == {sent + MICRO}
