"""A GAN: exact in any micro-batches, on any devices, after any resume; and its counters count batches."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F
from helpers import CSV, DIGITS, TWO, furthest, run_here, run_process
from torch import Tensor, nn

from batchwise import MicroBatch
from batchwise.batching.random import mix
from batchwise.callbacks.noise_scale import NoiseScale
from batchwise.errors import Mistake, TrainingStopped
from batchwise.models import place
from batchwise.tasks.adversarial import Adversarial

GAN = '''
"""A GAN on the digits."""

import torch.nn.functional as F
from torch import nn

from batchwise.models.dropout import Dropout
from batchwise.tasks.adversarial import Adversarial


class Networks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), Dropout(0.2), nn.Linear(32, 1))

    def forward(self, images):
        return self.discriminator(images.flatten(1))


class GAN(Adversarial):
    players = ("discriminator", "generator")

    def losses(self, batch, player=""):
        real, noise = batch.inputs.flatten(1), batch.randn("noise", 8)
        fake = self.network.generator(noise)
        if player == "generator":
            return F.softplus(-self.network.discriminator(fake)).squeeze(1)
        judged = F.softplus(-self.network.discriminator(real)) + F.softplus(self.network.discriminator(fake.detach()))
        return judged.squeeze(1)
'''


@pytest.fixture
def gan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    (tmp_path / "own_gan.py").write_text(GAN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_gan", raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(small.__file__).parents[2] / 'src'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    adam = "{class_path: torch.optim.Adam, init_args: {lr: 0.002, betas: [0.5, 0.9]}}"
    (tmp_path / "gan.yaml").write_text(
        f"""
model:
  class_path: own_gan.GAN
  init_args:
    network: own_gan.Networks
    optimizer:
      discriminator: {adam}
      generator: {adam}
    steps: {{discriminator: 2}}
    schedule: {{shape: linear}}
"""
    )
    return (
        "fit",
        *DIGITS[:2],
        *CSV,
        "--config",
        "gan.yaml",
        "--trainer.precision",
        "64-true",
        "--data.batch_size",
        100,
    )


@pytest.mark.slow
def test_a_gan_is_exact_however_it_is_run(gan: tuple[object, ...]) -> None:
    run = (*gan, "--trainer.max_epochs", 3)
    whole = run_here(*run, "--name", "whole")
    assert whole.code == 0, whole.err
    assert whole.checkpoint()["global_step"] == 39  # three steps of two players on each of 13 batches in 3 epochs
    parts = run_here(*run, "--name", "parts", "--data.micro_batch_size", 15)
    two = run_process(*run, *TWO, "--name", "two", "--data.micro_batch_size", 26, timeout=90)
    assert two.code == 0, two.err
    first = run_here(*run, "--name", "on", "--trainer.max_steps", 17, "--model.schedule.shape", "constant")
    assert first.code == 0, first.err
    for name, other in {"7 micro-batches": parts, "2 processes": two}.items():
        assert furthest(whole, other) < 1e-12, name
        for column in ("train/loss", "val/loss", "gradient_norm"):
            ours, theirs = whole.rows(column), other.rows(column)
            assert ours.keys() == theirs.keys()
            assert max(abs(ours[step] - theirs[step]) for step in ours) < 1e-12, (name, column)


def test_tune_has_no_loss_to_go_by(gan: tuple[object, ...]) -> None:
    result = run_here("tune", *gan[1:])
    assert result.code == 2
    assert "with several optimizers no loss says how far training is" in result.err


@pytest.mark.slow
def test_a_gan_resumes_on_another_topology(gan: tuple[object, ...]) -> None:
    run = (*gan, "--model.schedule.shape", "constant")
    whole = run_here(*run, "--trainer.max_epochs", 3, "--name", "whole")
    first = run_here(*run, "--trainer.max_steps", 17, "--data.micro_batch_size", 15)
    assert whole.code == first.code == 0, first.err
    on = run_process(*run, *TWO, "--trainer.max_epochs", 3, "--ckpt_path", "last", timeout=90)
    assert on.code == 0, on.err
    assert "resuming after step 17" in on.out
    assert furthest(whole, on) < 1e-12


# Against plain PyTorch


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(5, 4).double(), nn.Linear(4, 1).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs))


class Game(Adversarial):
    """The first makes the outcome large, the second makes it small."""

    def losses(self, batch: MicroBatch, player: str = "") -> Tensor:
        outcome = self(batch.inputs).squeeze(1)
        return F.softplus(outcome) if player == "second" else F.softplus(-outcome)


def made(rate: float, kind: Any = torch.optim.SGD) -> Any:
    return lambda parameters: kind(parameters, lr=rate)


def test_there_is_no_noise_scale_of_several_losses() -> None:
    task = Game(Pair(), optimizer={"first": made(0.1), "second": made(0.1)})
    with pytest.raises(
        Mistake, match=r"^trainer\.callbacks has NoiseScale, but with several optimizers .*: leave it out$"
    ):
        small.fit(task, small.Points(micro_batch_size=3), callbacks=[NoiseScale()])


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_turns_are_those_of_a_plain_loop(micro_batch_size: int | None) -> None:
    optimizers = {"first": made(0.1), "second": made(0.01, torch.optim.Adam)}
    pair = Pair()
    reference = copy.deepcopy(pair)
    data = small.Points(micro_batch_size=micro_batch_size)
    task, trainer = small.fit(Game(pair, optimizer=optimizers, steps={"second": 2}), data)
    assert trainer.global_step == 21
    players = {name: make(getattr(reference, name).parameters()) for name, make in optimizers.items()}
    assert data.plan is not None
    for step in range(21):
        index = data.order.indices(step // 7, *data.plan.bounds(step))
        for player in ("first", "second", "second"):
            reference.zero_grad()
            outcome = reference(data.x[index]).squeeze(1)
            (F.softplus(outcome) if player == "second" else F.softplus(-outcome)).mean().backward()
            players[player].step()
    assert small.furthest(task.network, reference) < 1e-14


class Stepping(Game):
    """Overrides `optimizer_step`, and does what Lightning does."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:  # type: ignore[override]
        self.steps = [
            *getattr(self, "steps", []),
            next(n for n, one in self.trainer.optimizers[0].players.items() if one is optimizer.optimizer),
        ]  # type: ignore[attr-defined]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


def test_an_overridden_optimizer_step_is_called_in_each_turn() -> None:
    """With the optimizer of the player, and with clipping."""
    settings: dict[str, Any] = {"optimizer": {"first": made(0.1), "second": made(0.1)}, "steps": {"second": 2}}
    whole, _ = small.fit(Game(Pair(), **settings), max_epochs=1, gradient_clip_val=0.1)
    task, _ = small.fit(Stepping(Pair(), **settings), max_epochs=1, gradient_clip_val=0.1)
    assert task.steps == ["first", "second", "second"] * 7
    assert small.furthest(task, whole) == 0


class Broken(Game):
    """The loss of one player is not finite, on all batches or on every second one."""

    player, every = "first", 1

    def losses(self, batch: MicroBatch, player: str = "") -> Tensor:
        losses = super().losses(batch, player)
        broken = player == self.player and self._own_data is None and self.trainer.global_step % self.every == 0
        return losses * torch.nan if broken else losses


@pytest.mark.parametrize("player", ["first", "second"])
def test_batches_in_which_a_player_is_skipped_count_once_each(
    player: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Whatever the other player does, and however many turns a player has."""
    monkeypatch.setattr(Broken, "player", player)
    settings: dict[str, Any] = {"optimizer": {"first": made(0.1), "second": made(0.1)}, "max_skipped_steps": 3}
    settings["steps"] = {"first": 2, "second": 2}
    with pytest.raises(TrainingStopped, match="not finite in 3 steps in a row, up to step 2:"):
        small.fit(Broken(Pair(), **settings), max_epochs=1)
    assert capsys.readouterr().out.count("skipped; its examples") == 3
    monkeypatch.setattr(Broken, "every", 2)
    task, _ = small.fit(Broken(Pair(), **settings), max_epochs=1)
    assert capsys.readouterr().out.count("skipped; its examples") == 4
    assert task._step.finite.skipped_in_a_row == 1


def test_each_turn_draws_anew() -> None:
    keys = []

    class Draws(Game):
        def losses(self, batch: MicroBatch, player: str = "") -> Tensor:
            if self.training and place.current is not None:
                keys.extend([place.current.key] * place.current.counts)
            return super().losses(batch, player)

    small.fit(Draws(Pair(), optimizer={"first": made(0.1), "second": made(0.1)}), max_epochs=1)
    assert len(keys) == len(set(keys)) == 14
    assert all(key < 2**63 for key in (*keys, mix(1)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": {"first": made(0.1), "third": made(0.1)}}, "third must be in both"),
        ({"optimizer": {"first": made(0.1)}, "steps": {"second": 1}}, "second must be in both"),
        ({"optimizer": {"first": made(0.1)}, "steps": {"first": 0}}, "write whole numbers of at least 1"),
    ],
)
def test_players_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Game(Pair(), **settings)


class Single(Game):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_an_optimizer_that_is_none_of_the_players_is_refused() -> None:
    with pytest.raises(Mistake, match=r"^configure_optimizers of Single gives SGD, which no player steps: write model"):
        small.fit(Single(Pair(), optimizer={"first": made(0.1), "second": made(0.1)}))


def test_players_that_share_a_parameter_are_refused() -> None:
    pair = Pair()
    pair.second.bias = pair.first.bias
    with pytest.raises(ValueError, match="the players first and second share a parameter"):
        Game(pair, optimizer={"first": made(0.1), "second": made(0.1)})


def test_rates_of_parts_of_a_player() -> None:
    optimizers = {"first": made(0.1), "second": made(0.01)}
    _, trainer = small.fit(Game(Pair(), optimizer=optimizers, lr_factors={"first.bias": 0.5}), max_epochs=1)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([0.1, 0.05, 0.01])
