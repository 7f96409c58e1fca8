"""Check hyper-parameters when a mechanism is built; a ValueError names the option, its range and the given value.

Types are checked too: a string in place of a number would fail later under another name, and a string in place of a
boolean would count as true.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Group = TypeVar("Group")


def check_choice(name: str, got: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if got not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {got!r}")


def check_integer(name: str, got: object, low: int, high: int | None = None) -> int:
    """Return a whole number from `low` to `high`, if there is a `high`; raise ValueError for anything else."""
    if isinstance(got, bool) or not isinstance(got, int) or got < low or (high is not None and got > high):
        span = f"at least {low}" if high is None else f"{low} .. {high}"
        raise ValueError(f"{name} must be a whole number, {span}; got {got!r}")
    return got


def check_number(
    name: str, got: object, *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf
) -> None:
    """Raise ValueError unless the value is finite and `above < value < below` and `value >= least`."""
    number = float(got) if isinstance(got, (int, float)) and not isinstance(got, bool) else math.nan
    if not (number > above and number >= least and number < below and math.isfinite(number)):
        span = f" above {above:g}" if above > -math.inf else f", at least {least:g}" if least > -math.inf else ""
        span += "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{name} must be a finite number{span}; got {got!r}")


def check_flags(**flags: object) -> None:
    """Raise ValueError unless each value is a boolean."""
    for name, got in flags.items():
        if not isinstance(got, bool):
            raise ValueError(f"{name} must be true or false; got {got!r}")


def build_group(name: str, kind: type[Group], given: Group | Mapping[str, Any]) -> Group:
    """Build a group of options from a group or a mapping; missing options get their defaults.

    Raises:
        ValueError: An option is unknown or outside its range; the message suggests a similar name.
    """
    if isinstance(given, kind):
        return given
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} must be a mapping with any of {', '.join(known)}; got {given!r}")
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {name}.{close[0]}?" if close else "."
            raise ValueError(f"there is no option {name}.{key}{hint} Available: {', '.join(known)}")
    return kind(**given)


def flatten_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten groups to dotted names, as in overrides: `{"gate": {"tau": 1}}` becomes `{"gate.tau": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        inner = flatten_options(value) if isinstance(value, Mapping) else {}
        flat |= {f"{name}.{key}": each for key, each in inner.items()} or {name: value}
    return flat


def nest_options(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Rebuild the groups, the inverse of `flatten_options`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, last = name.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return nested
