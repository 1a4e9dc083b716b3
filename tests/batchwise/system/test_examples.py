"""The complete files in docs train to the same result in any way, and the check before training finds nothing."""

import re
import warnings

import examples
import forks
import pytest
from examples import DOCS, MAKE, files, furthest, lines_of, measure, train


@pytest.mark.weekly  # half a minute; the plain run still checks each file in this process
def test_the_result_does_not_depend_on_how_the_batch_is_executed(tmp_path):
    """In one test, because the two processes train all of them."""
    found = measure(tmp_path, forks.Process)
    assert {name: len(ways) for name, ways in found.items()} == dict.fromkeys(MAKE, 5)
    far = {(name, way): pair for name, ways in found.items() for way, pair in ways.items() if max(pair) >= 1e-12}
    assert far == {}


def warned(name: str, **settings: int) -> tuple[dict, list[str]]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = train(name, **settings)
    return result, [str(each.message) for each in seen if "site-packages" not in each.filename]


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.slow
def test_the_check_before_training_finds_nothing(name):
    assert warned(name, micro=4)[1] == []


def test_what_is_not_keyed_is_seen_by_both(monkeypatch):
    """So that the two tests above can fail."""
    text = files()["vae"].replace('batch.randn("code", mean.shape[1])', "torch.randn_like(mean)")
    monkeypatch.setattr(examples, "files", lambda: {"vae": text})
    whole, said = warned("vae")
    assert "draws random numbers that depend on how the batch is executed" in said[0]
    weights, logged = furthest(whole, train("vae", micro=4))
    assert weights > 1e-6
    assert logged > 1e-6


@pytest.mark.slow
def test_examples_train():
    untrained = examples.make("ink", micro=None)[0].state_dict()
    assert max(float((train("ink")["weights"][name] - value).abs().max()) for name, value in untrained.items()) > 1e-3


def test_the_page_says_how_long_the_files_are():
    rows = re.findall(r"^\| .*`src/\w+/(\w+)\.py`.*? \| (\d+) \|", (DOCS / "tasks.md").read_text(), re.MULTILINE)
    assert {name: int(lines) for name, lines in rows} == {name: lines_of(name) for name in MAKE}
    assert all(20 <= int(lines) <= 70 for _, lines in rows)


def test_the_teacher_stays_in_evaluation_mode(monkeypatch):
    modes, make = set(), examples.make

    def watched(*arguments):
        task, data = make(*arguments)
        task.teacher.register_forward_hook(lambda module, *_: modes.add((task.training, module.training)))
        return task, data

    monkeypatch.setattr(examples, "make", watched)
    train("distil")
    assert modes == {(True, False), (False, False)}
