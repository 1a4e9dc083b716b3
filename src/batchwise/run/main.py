"""The entry of `python -m {program}`: help comes at once, and a command does not wait for needless imports."""

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from batchwise import __version__
from batchwise.output import nobody_reads, write_nowhere
from batchwise.run import program

LEADER = "BATCHWISE_LEADER"
"""The environment variable that tells the processes of a training the number of the one that has started them."""
PR_SET_PDEATHSIG = 1
CLOSED = 128 + 13
"""The exit code of a program that SIGPIPE ends."""
HELP = """usage: python -m {program} COMMAND --config FILE [--config OVERLAY ...] [--KEY VALUE ...]

commands:
  fit         train, and validate after each epoch
  validate    measure on the validation split
  test        measure on the test split
  predict     write predictions, one row per example
  export      write one file that predicts without this project, for PyTorch or ONNX
  tune        choose the batch size: what fits, what is fast, what the gradient says
  sweep       train each batch size to a target, and see which is the fastest
  schema      write the schema from which an editor completes configurations
  shards      write the examples as shards; `shards DIR` makes the index of shards that are there
  inspect     look at the batches without training, and find what is wrong with the data

the flags that matter:
  --config FILE                            a configuration; later ones lay over earlier ones
  --name NAME                              name of the experiment: runs go to runs/NAME/TIME
  --data.batch_size N                      examples per optimizer step, over all devices together
  --data.micro_batch_size N                most examples on one device at once; does not change the result
  --trainer.max_epochs N                   length of training in epochs (or --trainer.max_steps, in optimizer steps)
  --trainer.devices N                      devices on this machine; does not change the result
  --trainer.precision bf16-mixed           number format
  --model.optimizer.lr X                   learning rate
  --ckpt_path last|best|FILE               resume (fit), or what to measure
  --print_config                           print the complete configuration and exit

examples:
  python -m {program} fit --config configs/digits.yaml
  python -m {program} test --config configs/digits.yaml --ckpt_path best

`python -m {program} fit --help` lists everything.
"""


class _OnDemand(ModuleType):
    """Stands in for scipy.signal while torchmetrics is imported. That only asks whether the module has `hamming`."""

    hamming = None

    def __getattr__(self, name: str) -> Any:
        """Import the module itself, because another version of torchmetrics may need it."""
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


def _load() -> Callable[[list[str]], int]:
    """Import the command line, with Lightning.

    Two needless things are left out. Medians of 8 interleaved starts on 2 cores: 2.8 s, and 5.4 s with both of them.
    The garbage collector takes 1.4 to 1.8 s: modules are not garbage, but it scans all of them a hundred times.
    The import of scipy.signal takes 0.6 to 1.1 s.
    """
    if "batchwise.run.cli" not in sys.modules:
        gc.disable()
        stand_in = sys.modules.setdefault("scipy.signal", _OnDemand("scipy.signal"))
        import_module("batchwise.run.cli")
        if isinstance(stand_in, _OnDemand) and sys.modules.get("scipy.signal") is stand_in:
            del sys.modules["scipy.signal"]
        gc.freeze()
        gc.enable()
    return sys.modules["batchwise.run.cli"].run


def end_with_the_leader() -> None:
    """Let this process end with the one that has started it, also while others wait for that (on Linux)."""
    leader = os.environ.get(LEADER, "")
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ and leader not in ("", str(os.getpid())):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        try:
            os.kill(int(leader), 0)
        except ProcessLookupError:  # it has ended already
            sys.exit(1)


def main(name: str | None, arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code: 0 done, 1 failed, 2 the user's mistake, more than 128 stopped by a signal.

    A command ends where nobody reads its output any more, as other programs do. It has no signal for that, because a
    connection between processes would send the same one.

    Args:
        name: the package behind `python -m`.
        arguments: the command and its flags; None: those of this process.
    """
    try:
        code = _main(name, arguments)
        print(end="", flush=True)  # there may be no output
    except BrokenPipeError:
        if not nobody_reads():
            raise
        code = CLOSED
    except KeyboardInterrupt:  # outside of a command, as while the project is imported
        print("error: interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    if code == CLOSED:  # Python would write the rest at its end
        write_nowhere()
    return code


def _main(name: str | None, arguments: list[str] | None) -> int:
    program.name = name or program.name
    end_with_the_leader()
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        # Importing Lightning takes seconds, and nobody should wait for these lines.
        print(HELP.format(program=program.name), end="")
        return 0
    if arguments[0] == "--version":
        print(f"batchwise {__version__}")
        return 0
    run = _load()
    if arguments[0] == "schema":
        return import_module("batchwise.run.schema").write(arguments[1:])
    if arguments[0] == "shards" and len(arguments) > 1 and not arguments[1].startswith("-"):
        return import_module("batchwise.run.indexing").index(arguments[1:])
    return run(arguments)
