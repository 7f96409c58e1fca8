"""Spaces: the overrides that a sweep varies, in Hydra's grammar.

`seed=0,1,2` and `range(3)` list choices, `interval(0.05, 0.3)` and `tag(log, interval(1e-4, 1e-2))` are ranges of
numbers (`int(interval(1, 8))` of whole ones), anything else is the same in every trial. Spaces exist because mechanisms
have their own knobs: `attention.keys` is an error for all but one of them. A trial belongs to one space.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from thresher.config.overrides import parse


class Suggests(Protocol):
    """Proposes values: an Optuna trial."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...


@dataclass(frozen=True)
class Varied:
    """An override with several values: a list or an interval."""

    key: str
    text: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    def suggest(self, trial: Suggests, prefix: str) -> str:
        """Return the override that a trial proposes."""
        name = f"{prefix}{self.key}"
        if self.choices:
            return f"{self.key}={trial.suggest_categorical(name, self.choices)}"
        if isinstance(self.low, int) and isinstance(self.high, int):
            return f"{self.key}={trial.suggest_int(name, self.low, self.high, log=self.log)}"
        return f"{self.key}={trial.suggest_float(name, self.low, self.high, log=self.log)!r}"


@dataclass(frozen=True)
class Space:
    """A named set of overrides, of which some vary."""

    name: str
    fixed: tuple[str, ...]
    varied: tuple[Varied, ...]

    def grid(self) -> Iterator[tuple[str, ...]]:
        """Yield the overrides of every combination; the last override varies fastest."""
        for parameter in self.varied:
            if not parameter.choices:
                raise ValueError(
                    f"{parameter.text}: an interval has no grid. List its values, or choose sampler=random, tpe, nsga2 "
                    "or gp"
                )
        for values in itertools.product(*(parameter.choices for parameter in self.varied)):
            varied = (f"{p.key}={value}" for p, value in zip(self.varied, values, strict=True))
            yield (*self.fixed, *varied)


@dataclass(frozen=True)
class Spaces:
    """All spaces of a sweep."""

    members: tuple[Space, ...]

    def grid(self) -> list[tuple[str, ...]]:
        """Return every point of every space, in turns, so that an unfinished sweep has some of each."""
        rounds = itertools.zip_longest(*(space.grid() for space in self.members))
        return list(dict.fromkeys(point for points in rounds for point in points if point is not None))

    def suggest(self, trial: Suggests) -> tuple[str, ...]:
        """Return the overrides that a trial proposes; with several spaces, the choice between them is a parameter."""
        space, prefix = self.members[0], ""
        if len(self.members) > 1:
            named = {member.name: member for member in self.members}
            space = named[trial.suggest_categorical("space", tuple(named))]
            prefix = f"{space.name}/"
        return (*space.fixed, *(parameter.suggest(trial, prefix) for parameter in space.varied))

    def text(self) -> list[list[str]]:
        """Return the content of the spaces as plain values."""
        return [[s.name, *s.fixed, *(p.text for p in s.varied)] for s in self.members]


def read_spaces(common: Sequence[str], spaces: Mapping[str, Sequence[str]], last: Sequence[str] = ()) -> Spaces:
    """Read the overrides of a sweep.

    Args:
        common: Overrides of every trial.
        spaces: Overrides of each space, by name; none: there is one space, of the common overrides.
        last: Overrides that replace those of the same key, wherever they stand.

    Raises:
        ValueError: An override does not follow Hydra's grammar, or varies in an unsupported way.
    """
    members = []
    for name, own in (spaces or {"": ()}).items():
        overrides: dict[str, tuple[str, Varied | None]] = {}
        for text in (*common, *own):
            key, value = _read_override(text)
            if key in overrides:
                raise ValueError(f"{key} is given twice{f' in the space {name}' if name else ''}")
            overrides[key] = (text, value)
        overrides |= {key: (text, value) for text in last for key, value in [_read_override(text)]}
        fixed = tuple(text for text, value in overrides.values() if value is None)
        members.append(Space(name, fixed, tuple(value for _, value in overrides.values() if value is not None)))
    return Spaces(tuple(members))


def _read_override(text: Any) -> tuple[str, Varied | None]:
    """Read the key of an override, and its values if it varies."""
    if not isinstance(text, str):
        raise ValueError(
            f"{text!r} is not an override; YAML parts values at commas unless they are quoted: 'seed=0,1,2'"
        )
    (override,) = parse([text])
    key = override.get_key_element()
    if key.lstrip("+~") in ("run.dir", "hydra.run.dir"):
        raise ValueError(f"{text}: the sweep names the folder of each trial. Its own folder is run.dir before --")
    if not override.is_sweep_override():
        return key, None
    if override.is_interval_sweep():
        interval: Any = override.value()
        low, high = interval.start, interval.end
        if not low < high:
            raise ValueError(f"{text}: an interval goes from a smaller number to a larger one")
        return key, Varied(key, text, low=low, high=high, log="log" in interval.tags)
    if not (override.is_choice_sweep() or override.is_range_sweep()):
        raise ValueError(f"{text}: list the choices; a sweep does not expand patterns")
    return key, Varied(key, text, choices=tuple(dict.fromkeys(map(str, override.sweep_string_iterator()))))
