"""Command-line overrides, checked before Hydra sees them, so that a typo is answered with the nearest names."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

# Of one type in our configs, and of others, too, where one likes.
OF_SEVERAL_TYPES = (
    "attention.est_bits",
    "bench.train_step.gpt.n",
    "bench.train_step.vit.n",
    "bench.what",
    "logger.wandb.log_model",
    "trainer.devices",
    "trainer.fast_dev_run",
    "trainer.strategy",
)
COUNTS_OR_SHARES = (
    "attention.keys",
    "trainer.limit_test_batches",
    "trainer.limit_train_batches",
    "trainer.limit_val_batches",
    "trainer.overfit_batches",
    "trainer.val_check_interval",
)
KNOB = re.compile(r"dropin\.mechanisms\.\w+\.\w+")  # one value or a list of them
PLACE = re.compile(r"^  - /(\w+)@(\w+):", re.MULTILINE)  # in the defaults of a choice
PLAIN = re.compile(r"[A-Za-z0-9_./+@%-]+(?: [A-Za-z0-9_./+@%-]+)*")


def quoted(text: str) -> str:
    """Write a string as the value of an override, in quotes where Hydra's grammar would read something else."""
    if PLAIN.fullmatch(text) and not _read_as_another_type(text):
        return text
    # Backslashes count twice before a quote, and before the one that ends the string.
    escaped = re.sub(r"(\\+)\Z", r"\1\1", re.sub(r"(\\*)'", r"\1\1\\'", text))
    return f"'{escaped}'"


def _read_as_another_type(text: str) -> bool:
    if text.lower() in {"null", "true", "false", "inf", "nan", "-inf", "+inf"}:
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse(arguments: Iterable[str]) -> list[Override]:
    """Parse overrides such as `attention=latte` or `compute.target=0.1`.

    Raises:
        ValueError: One does not follow Hydra's grammar.
    """
    overrides = []
    for argument in arguments:
        try:
            overrides += OverridesParser.create().parse_overrides([argument])
        except HydraException as error:
            raise ValueError(
                f"{argument!r} is not an override; write key=value. ({str(error).splitlines()[0]})"
            ) from error
    return overrides


def checkpoint_in(given: Iterable[Override]) -> Path:
    """Return the checkpoint that overrides of an evaluation name.

    Raises:
        ValueError: They name none.
    """
    for override in given:
        if override.key_or_group == "ckpt" and override.value():
            return Path(str(override.value()))
    raise ValueError("which checkpoint? python eval.py ckpt=runs/.../checkpoints/best.ckpt [overrides]")


def compose_config(conf: Path, name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose a primary config of the folder `conf`."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def check(conf: Path, name: str, arguments: Sequence[str]) -> None:
    """Check the groups, choices and keys that overrides of the primary config `name` speak of.

    Additions (`+key`) and Hydra's own settings are left to Hydra, unless they add a place that is there.

    Raises:
        ValueError: A group has no such choice or place, or the config has no such key; the message says what is near.
    """
    given = [o for o in parse(arguments) if not (o.key_or_group + ".").startswith("hydra.")]
    overrides = [o for o in given if not o.is_add()]
    groups = [o for o in overrides if is_group(conf, o.key_or_group)]
    for override in groups:
        for choice in choices_of(conf, override):
            check_choice(conf, override.key_or_group, choice)
    placed = [o for o in given if o.package and is_group(conf, o.key_or_group)]
    if placed:
        whole = [_first(conf, o) for o in groups if o not in placed]
        check_places(conf, name, [choice for choice in whole if choice], placed)
    values = [o for o in overrides if o not in groups]
    if values:
        first = [_first(conf, o) for o in sorted(groups, key=lambda o: o in placed)]
        config = compose_config(conf, name, [choice for choice in first if choice])
        known = places(conf)
        for override in values:
            check_meaning(known, override)
            check_key(config, override.key_or_group)
            for value in values_of(override):
                check_type(config, override.key_or_group, value)


def is_group(conf: Path, key: str) -> bool:
    return "." not in key and (conf / key).is_dir()


def choices_of(conf: Path, override: Override) -> list[Any]:
    """Return the choices an override of a group names: several in a sweep, none in a deletion."""
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        glob: Any = override.value()
        if matching := glob.filter(available(conf, override.key_or_group)):
            return list(matching)
        raise ValueError(f"no {override.key_or_group} matches {str(override.input_line).partition('=')[2]}")
    if override.is_sweep_override():
        return [str(choice) for choice in override.sweep_string_iterator()]
    value = override.value()
    return [choice for choice in (value if isinstance(value, list) else [value]) if choice is not None]


def _first(conf: Path, override: Override) -> str:
    """Return an override of a group with the first of its choices, or nothing for a deletion."""
    choices = choices_of(conf, override)
    return f"{override.get_key_element()}={choices[0]}" if choices else ""


def places(conf: Path) -> dict[str, str]:
    """Return where groups may be chosen once more, as `GROUP@PLACE`, and the choice of a group that has the place."""
    found = {}
    for path in sorted(conf.glob("*/*.yaml")):
        group = path.parent.name
        for again, name in PLACE.findall(path.read_text(encoding="utf-8")):
            found[f"{again}@{group}.{name}"] = f"{group}={path.stem}"
    return found


def check_places(conf: Path, name: str, choices: Sequence[str], placed: Iterable[Override]) -> None:
    """Check the places, such as `attention@model.cross`, that overrides choose something for.

    Args:
        conf: The folder of the configs.
        name: The primary config.
        choices: Overrides of the other groups, with one choice each.
        placed: Overrides of groups with a place.

    Raises:
        ValueError: The config has no such place, or is to get one that it has.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        runtime = compose(name, overrides=list(choices), return_hydra_config=True).hydra.runtime
    for override in placed:
        key = override.get_key_element().lstrip("+~")
        known = {p: choice for p, choice in places(conf).items() if p.startswith(f"{override.key_or_group}@")}
        if override.is_add():
            if key in runtime.choices:
                raise ValueError(f"{key} needs no +: {str(override.input_line).lstrip('+')}")
        elif key not in runtime.choices:
            here = [place for place in known if place in runtime.choices]
            parent = str(override.package).partition(".")[0]
            has = f"{parent}={runtime.choices[parent]}" if parent in runtime.choices else "the config"
            near = here or [f"{place} with {choice}" for place, choice in known.items()]
            raise ValueError(f"{has} has no place {key}{_nearest(key, here)} Available: {', '.join(near)}")


def check_meaning(known: Mapping[str, str], override: Override) -> None:
    """Raise a ValueError for `attention.cross=topk` and the like, where `attention@model.cross=topk` is meant."""
    key, value = override.key_or_group, str(override.input_line).partition("=")[2]
    for place, choice in known.items():
        group, _, node = place.partition("@")
        inside = f"{group}.{node.rpartition('.')[2]}"
        if key == inside or (key == node and any(isinstance(v, str) for v in values_of(override))):
            raise ValueError(f"{key} is no choice of {group}; write {place}={value} (with {choice})")
        if key.startswith(f"{inside}."):
            raise ValueError(f"{key} is no key; write {place}=... {node}{key.removeprefix(inside)}={value}")


def chosen(conf: Path, group: str, choice: str) -> DictConfig:
    """Return what a choice of a group adds to the config of a training.

    Raises:
        ValueError: The group has no such choice.
    """
    check_choice(conf, group, choice)
    node: DictConfig = compose_config(conf, "train", [f"{group}={choice}"])[group]
    return node


def check_choice(conf: Path, group: str, choice: str) -> None:
    """Raise a ValueError unless the folder `conf` has the file for a choice of a group."""
    known = available(conf, group)
    if choice not in known:
        raise ValueError(f"there is no {group}={choice}{_nearest(choice, known)} Available: {', '.join(known)}")


def available(conf: Path, group: str) -> list[str]:
    """Return the choices of a group of the folder `conf`."""
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))


def check_key(config: DictConfig, key: str) -> None:
    """Raise a ValueError unless `config` has the dotted key."""
    known = sorted(dotted_keys(OmegaConf.to_container(config, resolve=False)))
    if key in known:
        return
    parent, _, last = key.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent and "._" not in f".{k}"]
    if siblings:
        raise ValueError(
            f"{parent or 'the config'} has no key {last!r}{_nearest(last, siblings)} It has: {', '.join(siblings)}. "
            f"(+{key}=... adds a key)"
        )
    raise ValueError(f"there is no key {key!r}{_nearest(key, known)} (+{key}=... adds a key)")


def values_of(override: Override) -> list[Any]:
    """Return the values that an override of a key gives it: several in a sweep over choices or a range."""
    if override.is_sweep_override():
        return list(override.sweep_iterator()) if override.is_discrete_sweep() else []
    return [] if override.is_delete() else [override.value()]


def check_type(config: DictConfig, key: str, value: Any) -> None:
    """Raise a ValueError where a value is of another type than what `config` has: a word in place of a number, say.

    Ranges are left to whoever uses the value; this much can be said before anything heavy is imported.
    """
    known: Any = OmegaConf.to_container(config, resolve=False)
    for part in key.split("."):
        known = known[part]
    if value is None or key in OF_SEVERAL_TYPES or (isinstance(value, str) and "${" in value):
        return
    if KNOB.fullmatch(key):
        like = known[0] if isinstance(known, list) else known
        for each in value if isinstance(value, list) else [value]:
            _check_value(key, each, like)
    else:
        _check_value(key, value, known)


def _check_value(key: str, value: Any, known: Any) -> None:
    if isinstance(known, dict) and not isinstance(value, dict):
        has = f"; set one of {', '.join(known)}" if known else ""
        raise ValueError(f"{key} holds entries by name, and cannot be {value!r}{has}")
    if isinstance(known, list) and not isinstance(value, list):
        raise ValueError(f"{key} must be a list, like {known}, not {value!r}")
    if isinstance(known, bool) and not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, not {value!r}")
    if isinstance(known, (int, float)) and not isinstance(known, bool):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        whole = isinstance(known, int) and key not in COUNTS_OR_SHARES
        if not number or (whole and isinstance(value, float)):
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{key} must be {kind}, like {known}, not {value!r}")


def dotted_keys(node: Any, prefix: str = "") -> Iterable[str]:
    """Yield the dotted names of every entry of nested dicts."""
    if isinstance(node, dict):
        for key, child in node.items():
            yield f"{prefix}{key}"
            yield from dotted_keys(child, f"{prefix}{key}.")


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else "."
