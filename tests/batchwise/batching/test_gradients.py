import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from batchwise.batching.gradients import scale_gradients, weighted_sum


def problem(examples: int, seed: int, tokens: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A network and examples in float64: one class target per example, or `tokens` of them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    shape = (examples, tokens) if tokens else (examples,)
    inputs = torch.randn(*shape, 5, generator=generator, dtype=torch.float64)
    return network, inputs, torch.randint(4, shape, generator=generator)


def losses_of(network: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(network(inputs).movedim(-1, 1), targets, reduction="none")


def gradient(network: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


def accumulated(network, inputs, targets, sizes, weights=None, target_weights=None) -> tuple[Tensor, Tensor]:
    """The gradient from micro-batches of the given sizes, as the training step does it; and the mean loss."""
    network.zero_grad()
    total = count = torch.zeros((), dtype=torch.float64)
    nominal = len(inputs)

    def split(value):
        return [None] * len(sizes) if value is None else value.split(sizes)

    for x, y, w, t in zip(*map(split, (inputs, targets, weights, target_weights)), strict=True):
        loss, number = weighted_sum(losses_of(network, x, y), w, t)
        (loss / nominal).backward()
        total, count = total + loss.detach(), count + number
    scale_gradients(network.parameters(), nominal / count)
    return torch.cat([p.grad.flatten() for p in network.parameters()]), total / count


def agree(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=2e-15)


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(sizes=SIZES, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_ragged_micro_batches_are_one_batch(sizes, seed):
    network, inputs, targets = problem(sum(sizes), seed)
    whole = losses_of(network, inputs, targets).mean()
    found, loss = accumulated(network, inputs, targets, sizes)
    agree(found, gradient(network, whole))
    agree(loss, whole)


@given(sizes=SIZES, seed=st.integers(0, 99), by_example=st.booleans(), by_target=st.booleans())
@settings(max_examples=60, deadline=None)
def test_weights_of_examples_and_of_tokens(sizes, seed, by_example, by_target):
    examples, tokens = sum(sizes), 3
    network, inputs, targets = problem(examples, seed, tokens)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(examples, generator=generator, dtype=torch.float64) + 0.1 if by_example else None
    target_weights = None
    if by_target:  # about half of them zero: tokens that do not count
        target_weights = torch.rand(examples, tokens, generator=generator, dtype=torch.float64)
        target_weights = torch.where(target_weights < 0.5, 0.0, target_weights)
        target_weights[0, 0] = 1.0
    w = torch.ones(examples, tokens, dtype=torch.float64)
    w = w * (1 if weights is None else weights[:, None]) * (1 if target_weights is None else target_weights)
    whole = (w * losses_of(network, inputs, targets)).sum() / w.sum()
    found, loss = accumulated(network, inputs, targets, sizes, weights, target_weights)
    agree(found, gradient(network, whole))
    agree(loss, whole)


def test_a_mean_of_means_would_be_seen():
    network, inputs, targets = problem(9, 0)
    losses = losses_of(network, inputs, targets)
    wrong = (losses[:8].mean() + losses[8:].mean()) / 2
    found, _ = accumulated(network, inputs, targets, [8, 1])
    assert (found - gradient(network, wrong)).abs().max() > 1e-3


def test_a_micro_batch_in_which_nothing_counts():
    network, inputs, targets = problem(7, 1)
    weights = torch.tensor([1, 1, 0, 0, 0, 1, 1], dtype=torch.float64)
    counts = weights == 1
    whole = losses_of(network, inputs[counts], targets[counts]).mean()
    expected = gradient(network, whole)
    for sizes in ([2, 3, 2], [7], [1, 1, 1, 1, 1, 1, 1], [4, 3]):
        found, loss = accumulated(network, inputs, targets, sizes, weights)
        agree(found, expected)
        agree(loss, whole)


def test_a_stand_in_changes_nothing():
    # One device of two has nothing left to do; it runs the first example with weight zero.
    network, inputs, targets = problem(3, 2)
    stand_in = torch.tensor([0, 1, 2, 0])
    weights = torch.tensor([1, 1, 1, 0], dtype=torch.float32)
    found, loss = accumulated(network, inputs[stand_in], targets[stand_in], [3, 1], weights)
    whole = losses_of(network, inputs, targets).mean()
    agree(found, gradient(network, whole))
    agree(loss, whole)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_does_not_count_with_weight_zero(bad):
    theta = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0, 4.0], [5.0, 6.0], [7.0, 8.0]], dtype=torch.float64)
    losses = x @ theta + torch.tensor([0.0, bad, 0.0], dtype=torch.float64)
    loss, count = weighted_sum(losses, torch.tensor([2.0, 0.0, 1.0]))
    (loss / count).backward()
    assert (loss.item(), count.item()) == (2 * 14 + 38, 3.0)
    assert theta.grad.tolist() == pytest.approx([3.0, 16 / 3], rel=1e-15)  # (2 * 1 + 7) / 3, (2 * 4 + 8) / 3
    # Neither as a token.
    loss, count = weighted_sum(losses.detach().expand(2, 3), torch.tensor([1.0, 0.5]), torch.tensor([[1, 0, 1]] * 2))
    assert (loss.item(), count.item()) == (1.5 * (14 + 38), 3.0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_loss_that_counts_and_is_not_finite_is_seen(bad):
    losses = torch.tensor([1.0, bad])
    assert not weighted_sum(losses, None)[0].isfinite()
    assert not weighted_sum(losses, torch.tensor([0.0, 1.0]))[0].isfinite()


def test_sums_and_counts_by_hand():
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    tokens = torch.tensor([[1, 1, 0], [0, 0, 1]])
    examples = torch.tensor([0.5, 2.0])

    def both(*arguments):
        return tuple(float(value) for value in weighted_sum(losses, *arguments))

    assert both(None) == (21.0, 6.0)
    assert both(examples) == (0.5 * 6 + 2 * 15, 7.5)
    assert both(None, tokens) == both(None, tokens.bool()) == both(None, tokens.float()) == (9.0, 3.0)
    assert both(examples, tokens) == (0.5 * 3 + 2 * 6, 0.5 * 2 + 2 * 1)
    assert [float(value) for value in weighted_sum(losses[:, 0], examples)] == [8.5, 2.5]
    assert both(torch.zeros(2)) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_has_the_precision_of_the_losses(dtype):
    losses = torch.ones(3, dtype=dtype)
    for weights, targets in ((None, None), (torch.ones(3), None), (None, torch.ones(3).bool()), (None, torch.ones(3))):
        loss, count = weighted_sum(losses, weights, targets)
        assert loss.dtype == dtype
        assert count == 3
        assert isinstance(count, int) or count.is_floating_point()  # known to the host, or added up with the losses


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [None, torch.ones(70_001)], ids=["none", "ones"])
def test_a_count_is_a_count_in_half_precision_too(dtype, weights):
    assert weighted_sum(torch.zeros(70_001, dtype=dtype), weights)[1] == 70_001


def grads(*values: float | None) -> list[nn.Parameter]:
    parameters = []
    for value in values:
        parameters.append(nn.Parameter(torch.zeros(2)))
        parameters[-1].grad = None if value is None else torch.full((2,), value)
    return parameters


def test_scale_gradients():
    parameters = grads(1.0, None, 3.0)
    held = [parameter.grad for parameter in parameters]
    scale_gradients(iter(parameters), torch.tensor(0.5, dtype=torch.float64))
    assert [p.grad if p.grad is None else p.grad.tolist() for p in parameters] == [[0.5, 0.5], None, [1.5, 1.5]]
    assert all(parameter.grad is grad for parameter, grad in zip(parameters, held, strict=True))  # in place
    assert parameters[0].grad.dtype == torch.float32


def test_a_factor_of_one_touches_nothing(monkeypatch):
    monkeypatch.setattr(torch, "_foreach_mul_", lambda *_: pytest.fail("multiplied by one"))
    parameters = grads(1.0, None)
    scale_gradients(parameters, 1.0)
    assert parameters[0].grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("parameters", [[], grads(None, None)])
def test_no_gradients_are_no_error(parameters):
    scale_gradients(parameters, torch.tensor(2.0))
    assert [parameter.grad for parameter in parameters] == [None] * len(parameters)


def test_a_factor_that_is_not_finite_reaches_every_gradient():
    parameters = grads(1.0, 0.0)
    scale_gradients(parameters, torch.tensor(float("nan")))
    assert all(parameter.grad.isnan().all() for parameter in parameters)


def test_real_and_complex_gradients_in_any_order():
    for kinds in ((torch.float64, torch.complex128), (torch.complex128, torch.float64)):
        parameters = [nn.Parameter(torch.ones(2, dtype=kind)) for kind in kinds]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        scale_gradients(parameters, torch.tensor(0.5, dtype=torch.float64))
        assert all(bool((parameter.grad == 0.5).all()) for parameter in parameters)
