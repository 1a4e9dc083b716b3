"""Numbers out of their range are one line on the command line, which names the key and what to write."""

import pytest
from helpers import DIGITS, run_here

AT_LEAST_1 = "write a whole number of at least 1"
ORDER = "batchwise.batching"
WRONG = {
    "data.batch_size": ("0", AT_LEAST_1),
    "data.micro_batch_size": ("0", AT_LEAST_1),
    "data.eval_batch_size": ("0", AT_LEAST_1),
    "data.batch_tokens": ("0", AT_LEAST_1),
    "data.micro_batch_tokens": ("-3", AT_LEAST_1),
    "data.num_workers": ("-1", "write a whole number of at least 0"),
    "data.max_unreadable": ("-1", "write a whole number of at least 0"),
    "data.resident_share": ("1.5", "write a number from 0 to 1"),
    "data.examples_per_class": ("0", AT_LEAST_1),
    "model.label_smoothing": ("-0.1", "write a number from 0 to 1"),
    "trainer.accumulate_grad_batches": ("0", AT_LEAST_1),
    "trainer.threads": ("0", AT_LEAST_1),
}


@pytest.mark.parametrize("key", WRONG)
@pytest.mark.slow
def test_flags(key: str) -> None:
    value, remedy = WRONG[key]
    result = run_here("fit", *DIGITS, f"--{key}={value}")
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith(f"error: {key} is {value}")
    assert remedy in line


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (f"--data.order={{class_path: {ORDER}.order.Repeated, init_args: {{k: 0}}}}", "k is 0"),
        (f"--data.order={{class_path: {ORDER}.sampling.Bucketed, init_args: {{window: 0}}}}", "window is 0"),
        (f"--data.batch_size_schedule={{class_path: {ORDER}.schedule.Adaptive, init_args: {{most: 0}}}}", "most is 0"),
        (
            "--trainer.callbacks=[{class_path: batchwise.callbacks.noise_scale.NoiseScale, "
            "init_args: {every_n_steps: 0}}]",
            "every_n_steps is 0",
        ),
    ],
)
def test_classes(flag: str, words: str) -> None:
    result = run_here("fit", *DIGITS, flag)
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert f"{words}: {AT_LEAST_1}" in line


def test_a_text_of_negative_length() -> None:
    network = "{class_path: batchwise.models.transformer.Transformer}"
    model = ("--model", "batchwise.tasks.language.Language", "--model.network", network)
    result = run_here("fit", "--data", "batchwise.sources.digits.Digits", *model, "--model.sample_length", -1)
    assert result.err == "error: model.sample_length is -1: write a whole number of at least 0\n"
