"""Where an error comes from: the user's code, the engine or a library."""

import os
import sysconfig
import traceback


def said(error: BaseException) -> str:
    """Return the kind and the words of an error, and the line of the user's code that raised it, if it did."""
    return f"{type(error).__name__}: {error}".splitlines()[0] + place(error)


def place(error: BaseException) -> str:
    """Return the line of the user's code that raised an error, such as ` at data.py:25`; nothing: other code did."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(other in frame.filename for other in _LIBRARIES)]
    if not own or own[-1].filename.startswith(_ENGINE):  # whose messages say what to write
        return ""
    return f" at {os.path.basename(own[-1].filename)}:{own[-1].lineno}"


_LIBRARIES = (
    *(f"{os.sep}{name}-packages{os.sep}" for name in ("site", "dist")),  # the latter on Debian, and in Colab
    *(f"{sysconfig.get_path('stdlib')}{os.sep}", "<frozen "),
)
"""Where the code of installed packages is, and that of Python."""
_ENGINE = os.path.dirname(__file__) + os.sep
