"""Whether an error is the user's, the engine's or a library's."""

from pathlib import Path

import pytest

from batchwise.origin import place


@pytest.mark.parametrize(("folder", "where"), [(".", " at fails.py:1"), ("site-packages", ""), ("dist-packages", "")])
def test_the_line_is_that_of_the_user_and_of_no_library(
    folder: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian and Colab install into `dist-packages`."""
    file = Path(folder, "fails.py").absolute()
    file.parent.mkdir(exist_ok=True)
    file.write_text("raise ValueError('x')")
    with pytest.raises(ValueError, match="x") as raised:
        exec(compile(file.read_text(), file, "exec"))
    test = raised.value.__traceback__
    assert test is not None
    assert place(raised.value.with_traceback(test.tb_next)) == where  # without this file, which is a user's, too
