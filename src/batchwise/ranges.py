"""Types of numbers that have a range. The command line refuses a number outside of its range, in one line.

A type checker takes them for `int` and `float`, and so does a class: the command line hands it ordinary numbers. In
Python, `batchwise.arguments` checks those of the engine's classes.
"""

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    PositiveInt: TypeAlias = int
    NonNegativeInt: TypeAlias = int
    PositiveFloat: TypeAlias = float
    ClosedUnitInterval: TypeAlias = float
    OpenUnitInterval: TypeAlias = float
else:
    from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt

__all__ = ["ClosedUnitInterval", "NonNegativeInt", "OpenUnitInterval", "PositiveFloat", "PositiveInt"]
