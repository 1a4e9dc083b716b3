"""Processes that run the project, without the seconds that each would spend on importing Lightning.

`Process` takes the place of `subprocess.Popen`. What it starts is a process like any other, with its own arguments,
environment, working folder, output, exit code and process group, which can be killed. But it is forked from a server
that has imported the project and done nothing else; so are the further processes that Lightning's launcher starts.

What differs from a new interpreter: libraries read the environment when they are imported, which is in the server (of
what they read, `OMP_NUM_THREADS` and the rank are made up for), and all processes have the same seed of `hash`.
Therefore some tests start new interpreters (`fresh` in helpers.py).

This file is a module of the tests, and also the program that the server is: it is started when first needed and ends
when nobody holds the other end of its socket any more.
"""

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LARGEST_REQUEST = 2**20  # bytes


class Process:
    """As much of `subprocess.Popen` as tests and Lightning's launcher use; `stdout` and `stderr` are descriptors."""

    def __init__(
        self,
        command: list[str],
        *,
        stdout: int = 1,
        stderr: int = 2,
        env: dict[str, str] | None = None,
        cwd: Path | str | None = None,
        process_group: int | None = None,
    ) -> None:
        self.args, self.returncode = command, None
        request = {
            "command": command,
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or Path.cwd()),
            "group": os.getpgrp() if process_group is None else process_group,
        }
        self._reply, reply = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with reply:
            descriptors = [reply.fileno(), stdout, stderr, connection().fileno()]
            socket.send_fds(connection(), [json.dumps(request).encode()], descriptors)
        self.pid = int(self._reply.recv(64))  # nothing is received, which is an error, where the server has failed
        self._lock = threading.Lock()  # Lightning polls in a thread

    def wait(self, timeout: float | None = None) -> int:
        with self._lock:
            if self.returncode is None:
                if not select.select([self._reply], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
                self.returncode = int(self._reply.recv(64))
                self._reply.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """The way to the server, from the tests or from a process that it forked."""

    requests: socket.socket | None = None
    process: subprocess.Popen | None = None
    lock = threading.Lock()


def connection() -> socket.socket:
    """Return the socket that takes requests; start the server if there is none."""
    with Server.lock:
        if Server.requests is None:
            Server.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                Server.process = subprocess.Popen(
                    [sys.executable, __file__, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # a process that forks should have no threads
                    process_group=0,  # Ctrl-C is for the tests
                )
    return Server.requests


# The server


def serve(server: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for each request, as long as there is somebody to make one; return it in the process that was asked for."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the watchers
    while True:
        message, descriptors, _, _ = socket.recv_fds(server, LARGEST_REQUEST, 4, socket.MSG_CMSG_CLOEXEC)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
    # A process for each request, which forks the one that was asked for and waits for its end.
    server.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = json.loads(message)
    pid = os.fork()
    if pid == 0:
        return request, descriptors
    try:
        watch(pid, request["group"], *descriptors)
    finally:
        os._exit(0)


def watch(pid: int, group: int, reply: int, *others: int) -> None:
    """Tell whoever asked for the process which it is, and its exit code as `subprocess` gives it."""
    os.setpgid(pid, group)  # as it does itself: whoever knows the process can already kill the group
    for descriptor in others:
        os.close(descriptor)  # a pipe must end when the process does
    with socket.socket(fileno=reply) as sender:
        sender.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        sender.send(str(os.waitstatus_to_exitcode(status)).encode())


def become(request: dict[str, Any], reply: int, stdout: int, stderr: int, client: int) -> None:
    """Give this process what a new one would have been started with."""
    import numpy
    import torch
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only
    from lightning.pytorch.strategies.launchers import subprocess_script

    os.setpgid(0, request["group"])
    os.close(reply)
    for descriptor, number in ((stdout, 1), (stderr, 2)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    own = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = [request["folder"], *own]  # the first was the folder of this file
    # What was read from the environment when libraries were imported:
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank_zero_only.rank = _get_rank() or 0
    # A run that forgot to set a seed must not be repeatable here. (Python's own generator sees to it.)
    torch.seed()
    numpy.random.seed()
    # Further processes of the same training are forked too.
    Server.requests = socket.socket(fileno=client)
    subprocess_script.subprocess = SimpleNamespace(Popen=Process)


def main() -> None:
    given = dict(os.environ)
    gc.disable()  # while importing, it takes a quarter of the time
    import wandb  # noqa: F401 - which the project imports when it logs

    import batchwise.run.cli  # noqa: F401

    gc.freeze()
    gc.enable()
    set_by_libraries = {name: value for name, value in os.environ.items() if given.get(name) != value}
    request, descriptors = serve(socket.socket(fileno=int(sys.argv[1])))
    become(request, *descriptors)
    os.environ.update(set_by_libraries)
    interpreter, option, module, *arguments = request["command"]
    assert (interpreter, option) == (sys.executable, "-m"), request["command"]
    sys.argv = ["", *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)  # what `python -m` does


if __name__ == "__main__":
    main()
