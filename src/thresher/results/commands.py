"""The command that repeats a run: its config, as overrides of the configs in `conf/`."""

import math
import re
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from thresher.config.overrides import compose_config, quote
from thresher.results.configs import BOOKKEEPING, Table, flatten, is_part_of, read_config
from thresher.results.runs import Run

REPLACEABLE = ("attention", "data", "trainer")  # groups of which eval.py takes another choice
REFERENCE = re.compile(r"\$\{([^:{}]+)\}")


class CommandWriter:
    """Writes the commands that repeat runs.

    Args:
        conf: Folder of the configs that `train.py` composes.
    """

    def __init__(self, conf: Path) -> None:
        self._conf = conf
        primary = OmegaConf.to_container(OmegaConf.load(conf / "train.yaml"), resolve=False)
        assert isinstance(primary, dict)
        entries = [next(iter(e.items())) for e in primary.pop("defaults") if isinstance(e, dict)]
        self._defaults = {group: str(choice) for group, choice in entries if choice is not None}
        self._primary = dict(flatten({k: v for k, v in primary.items() if k != "hydra"}))
        self._nearest_choice = lru_cache(maxsize=None)(self._find_nearest)
        self._choices: dict[str, dict[str, dict[str, Any]]] = {}

    def write(self, run: Run) -> str:
        """Write the command of a run as a line for a shell; nothing for a run without a config."""
        if not run.config:
            return ""
        return self._write_evaluation(run) if run.evaluation else self._write_training(run.config)

    def _write_training(self, config: dict[str, Any]) -> str:
        parts: dict[str, dict[str, Any]] = {}
        for key, value in config.items():
            parts.setdefault(key.partition(".")[0], {})[key] = value
        groups: list[str] = []
        values: list[str] = []
        for group in self._defaults:
            if group not in BOOKKEEPING:
                choice, changes = self._nearest_choice(group, tuple(parts.pop(group, {}).items()))
                groups += [f"{group}={choice}"] if choice != self._defaults[group] else []
                values += changes
        known = (*BOOKKEEPING, "seed")
        own = {key: value for part in parts.values() for key, value in part.items() if not is_part_of(key, *known)}
        values += _find_changes(
            {key: value for key, value in self._primary.items() if not is_part_of(key, *known)}, own
        )
        return _join("train.py", [*groups, *values, f"seed={config.get('seed', 0)}"])

    def _write_evaluation(self, run: Run) -> str:
        checkpoint = run.checkpoint
        if checkpoint is None:
            return ""
        trained = checkpoint.parent.parent / "config.yaml"
        try:
            before = read_config(trained.read_text())
        except (OSError, ValueError):
            before = {}
        overrides = []
        for group in (*REPLACEABLE, "model", "task") if before else ():
            was, now = _select(group, before), _select(group, run.config)
            if was.get(f"{group}._target_") == now.get(f"{group}._target_") or group not in REPLACEABLE:
                overrides += _find_changes(was, now)
            else:
                choice, changes = self._nearest_choice(group, tuple(now.items()))
                overrides += [f"{group}={choice}", *changes]
        overrides = [o for o in overrides if not o.startswith("model.pretrained=")]
        return _join("eval.py", [f"ckpt={_write_value(_relative_to_here(checkpoint))}", *overrides])

    def _find_nearest(self, group: str, items: tuple[tuple[str, Any], ...]) -> tuple[str, list[str]]:
        """Find the choice of a group that is nearest to a config, and the overrides that remain."""
        part = dict(items)
        changes = {choice: _find_changes(base, part) for choice, base in self._load_group(group).items()}
        default = self._defaults[group]
        choice = min(changes, key=lambda c: (len(changes[c]), c != default, c))
        return choice, changes[choice]

    def _load_group(self, group: str) -> dict[str, dict[str, Any]]:
        if group not in self._choices:
            names = [path.stem for path in sorted((self._conf / group).glob("*.yaml"))]
            self._choices[group] = {name: dict(flatten({group: self._load(group, name)})) for name in names}
        return self._choices[group]

    def _load(self, group: str, name: str) -> dict[str, Any]:
        node = OmegaConf.load(self._conf / group / f"{name}.yaml")
        if "defaults" in node:  # composition is slow, and most choices have no defaults list
            node = compose_config(self._conf / group, name)
        plain = OmegaConf.to_container(node, resolve=False)
        return {str(k): v for k, v in plain.items()} if isinstance(plain, dict) else {}


def _select(group: str, config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if is_part_of(key, group)}


def _find_changes(base: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Find the overrides that turn one flat config into another; references point to keys of the latter."""
    changed = [
        f"{'' if key in base else '+'}{key}={_write_value(value)}"
        for key, value in wanted.items()
        if key not in base or not _equals(base[key], value, wanted)
    ]
    # A reference such as ${attention} that was replaced by a node: the node replaces it key by key.
    replaced = {key for key in base if key not in wanted and any(w.startswith(f"{key}.") for w in wanted)}
    return changed + [f"~{key}" for key in base if key not in wanted and key not in replaced and base[key] != Table()]


def _equals(base: Any, value: Any, wanted: dict[str, Any]) -> bool:
    if isinstance(base, str) and base != value and (reference := REFERENCE.fullmatch(base)):
        base = wanted.get(reference.group(1), base)
    return bool(base == value) and (type(base) is type(value) or (_is_number(base) and _is_number(value)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _write_value(value: Any) -> str:
    """Write a value in the grammar of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, Table):
        return f"{{{','.join(f'{key}:{_write_value(child)}' for key, child in value)}}}"
    if isinstance(value, tuple):
        return f"[{','.join(_write_value(child) for child in value)}]"
    return str(value) if isinstance(value, int) else quote(str(value))


def _relative_to_here(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) else path)


def _join(script: str, overrides: list[str]) -> str:
    return " ".join(["python", script, *(shlex.quote(override) for override in overrides)])
