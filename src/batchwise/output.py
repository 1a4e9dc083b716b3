"""What becomes of the output when nobody reads it any more."""

import os
import select

OUT, ERR = 1, 2


def nobody_reads(stream: int = OUT) -> bool:
    """Return whether a stream's reader is gone: of a pipe, as in `fit ... | head`, or a terminal that was closed."""
    if not hasattr(select, "poll"):
        return False
    output = select.poll()
    output.register(stream, select.POLLOUT)  # macOS looks at nothing if asked for nothing, and calls the end POLLHUP
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in output.poll(0))


def write_nowhere() -> None:
    """Discard all further output that nobody reads. To write it would be an error, which ends the program."""
    for stream in (OUT, ERR):
        if nobody_reads(stream):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)
