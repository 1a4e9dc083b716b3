import math

import pytest

from batchwise.batching.schedule import Adaptive, Milestones


def test_points_are_numbers_of_examples_or_shares_of_the_training():
    assert Milestones([128, 256], shares=[0.5, 0.75]).changes(1001) == ((501, 128), (751, 256))
    assert Milestones([128, 256], examples=[10, 20]).changes(math.inf) == ((10, 128), (20, 256))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sizes": [2]}, "write one of shares and examples, 1 of them as of sizes"),
        ({"sizes": [2], "shares": [0.5], "examples": [3]}, "write one of shares and examples"),
        ({"sizes": [2, 3], "shares": [0.5]}, "2 of them as of sizes"),
        ({"sizes": [2, 3], "shares": [0.5, 0.5]}, r"shares are \[0.5, 0.5\]: write them rising, above 0 and below 1"),
        ({"sizes": [2], "shares": [1.0]}, "below 1"),
        ({"sizes": [2], "examples": [0]}, r"examples are \[0\]: write them rising, above 0"),
        ({"sizes": [0], "examples": [1]}, r"sizes are \[0\]: write whole numbers of at least 1"),
    ],
)
def test_wrong_milestones_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Milestones(**wrong)


def test_shares_of_a_training_without_end_are_refused():
    with pytest.raises(ValueError, match=r"write trainer.max_epochs, or examples"):
        Milestones([2], shares=[0.5]).changes(math.inf)


def test_adaptive_moves_by_a_factor_of_two_within_its_limits():
    schedule = Adaptive(100)
    assert [schedule.next(16, 16, 100, noise) for noise in (1, 20, 32, 1000)] == [16, 16, 32, 32]
    assert [schedule.next(64, 16, 100, noise) for noise in (1, 63, 64, 1000)] == [32, 32, 64, 64]
