"""Hyper-parameters, checked when a mechanism is built: a ValueError says the name, the range, and what was given.

Types are checked, too: a word in place of a number would fail later, by another name, and one in place of true or false
would pass for true.
"""

import math
from collections.abc import Sequence


def check_choice(name: str, got: object, choices: Sequence[object]) -> None:
    """Refuse what is none of the choices."""
    if got not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {got!r}")


def check_integer(name: str, got: object, low: int, high: int | None = None) -> None:
    """Refuse what is no whole number of at least `low` and, if there is a `high`, at most that."""
    if isinstance(got, bool) or not isinstance(got, int) or got < low or (high is not None and got > high):
        span = f"at least {low}" if high is None else f"{low} .. {high}"
        raise ValueError(f"{name} must be a whole number, {span}; got {got!r}")


def check_number(
    name: str, got: object, *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf
) -> None:
    """Refuse what is no finite number above one bound, at least another, and below a third."""
    number = float(got) if isinstance(got, (int, float)) and not isinstance(got, bool) else math.nan
    if not (number > above and number >= least and number < below and math.isfinite(number)):
        span = f" above {above:g}" if above > -math.inf else f", at least {least:g}" if least > -math.inf else ""
        span += "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{name} must be a finite number{span}; got {got!r}")


def check_flags(**flags: object) -> None:
    """Refuse what is neither true nor false."""
    for name, got in flags.items():
        if not isinstance(got, bool):
            raise ValueError(f"{name} must be true or false; got {got!r}")
