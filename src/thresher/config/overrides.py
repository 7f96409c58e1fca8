"""Parse and check command-line overrides before Hydra does, so that errors suggest near names."""

import difflib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override as Override
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

# Keys that take values of other types than the one in our configs.
ANY_TYPE = (
    "attention.estimate.bits",
    "train_step.gpt.n",
    "train_step.vit.n",
    "what",
    "data.image_size",
    "logger.wandb.log_model",
    "trainer.devices",
    "trainer.fast_dev_run",
    "trainer.strategy",
)
COUNTS_OR_SHARES = (  # whole numbers or fractions
    "attention.keys",
    "trainer.limit_test_batches",
    "trainer.limit_train_batches",
    "trainer.limit_val_batches",
    "trainer.overfit_batches",
    "trainer.val_check_interval",
)
DROPIN_VALUES = re.compile(r"dropin\.mechanisms\.\w+(\.\w+)+")  # one value or a list of them
EMPTY = {"callbacks": "none", "logger": "none", "compute": "free", "scheduler": "constant"}  # for nothing
OPTIONAL = ("experiment", "debug")  # groups without a choice by default
PLACE = re.compile(r"^  - /(\w+)@(\w+):", re.MULTILINE)  # in the defaults list of a choice: /GROUP@PLACE
UNQUOTED = re.compile(r"[A-Za-z0-9_./+@%-]+(?: [A-Za-z0-9_./+@%-]+)*")


def quote(text: str) -> str:
    """Quote a string as the value of an override if Hydra's grammar needs it."""
    if UNQUOTED.fullmatch(text) and not _is_other_type(text):
        return text
    # Backslashes count twice before a quote, and before the one that ends the string.
    escaped = re.sub(r"(\\+)\Z", r"\1\1", re.sub(r"(\\*)'", r"\1\1\\'", text))
    return f"'{escaped}'"


def _is_other_type(text: str) -> bool:
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
            if quoted := _suggest_quotes(argument):
                raise ValueError(
                    f"{argument!r}: a value with such characters needs quotes that reach Hydra; write {quoted}"
                ) from error
            raise ValueError(
                f"{argument!r} is not an override; write key=value, or group=choice such as attention=latte. "
                f"({str(error).splitlines()[0]})"
            ) from error
    return overrides


def _suggest_quotes(argument: str) -> str:
    """Suggest an override with its value quoted for a shell; nothing if that is no override either."""
    key, equals, value = argument.partition("=")
    override = f"{key}={quote(value)}"
    try:
        OverridesParser.create().parse_overrides([override])
    except HydraException:
        return ""
    plain = equals and not set(override) & set('"$`\\!')
    return (f'"{override}"' if plain else shlex.quote(override)) if equals else ""


def compose_config(conf: Path, name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose a primary config of the folder `conf`."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def check(conf: Path, name: str, arguments: Sequence[str]) -> None:
    """Parse overrides of the primary config `name` and check them (see `check_overrides`)."""
    check_overrides(conf, name, parse(arguments))


def check_overrides(conf: Path, name: str, parsed: Sequence[Override]) -> None:
    """Check the groups, choices and keys in overrides of the primary config `name`.

    Additions (`+key`) and Hydra's own settings are left to Hydra, unless they add a place that exists.

    Raises:
        ValueError: A group has no such choice or place, or the config has no such key; the message says what is near.
    """
    given = [o for o in parsed if not (o.key_or_group + ".").startswith("hydra.")]
    overrides = [o for o in given if not o.is_add()]
    groups = [o for o in overrides if is_group(conf, o.key_or_group)]
    for override in groups:
        choices = list_chosen(conf, override)
        if not choices and not (override.is_delete() and override.key_or_group in OPTIONAL):
            raise ValueError(_explain_no_choice(conf, override))
        for choice in choices:
            check_choice(conf, override.key_or_group, choice)
    placed = [o for o in given if o.package and is_group(conf, o.key_or_group)]
    if placed:
        whole = [_take_first(conf, o) for o in groups if o not in placed]
        check_places(conf, name, [choice for choice in whole if choice], placed)
    values = [o for o in overrides if o not in groups]
    if values:
        first = [_take_first(conf, o) for o in sorted(groups, key=lambda o: o in placed)]
        config = compose_config(conf, name, [choice for choice in first if choice])
        known = list_places(conf)
        for override in values:
            check_place_syntax(known, override)
            check_choice_syntax(conf, config, override)
            check_key(config, override.key_or_group)
            check_deletion(config, override)
            for value in list_values(override):
                check_type(config, override.key_or_group, value)


def is_group(conf: Path, key: str) -> bool:
    return "." not in key and (conf / key).is_dir()


def list_chosen(conf: Path, override: Override) -> list[Any]:
    """List the choices that an override of a group names: several in a sweep, none in a deletion."""
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        glob: Any = override.value()
        if matching := glob.filter(list_choices(conf, override.key_or_group)):
            return list(matching)
        raise ValueError(f"no {override.key_or_group} matches {str(override.input_line).partition('=')[2]}")
    if override.is_sweep_override():
        return [str(choice) for choice in override.sweep_string_iterator()]
    value = override.value()
    return [choice for choice in (value if isinstance(value, list) else [value]) if choice is not None]


def _explain_no_choice(conf: Path, override: Override) -> str:
    """Explain that a group needs a choice, and how to ask for none."""
    group = override.key_or_group
    if group in EMPTY:
        meant = f"write {group}={EMPTY[group]} for none"
    elif group in OPTIONAL or override.package:
        meant = "leave it out for none"
    else:
        meant = "every command needs one"
    given = str(override.input_line)
    return f"{given}: {group} takes the name of a choice; {meant}. Available: {', '.join(list_choices(conf, group))}"


def _take_first(conf: Path, override: Override) -> str:
    """Reduce an override of a group to the first of its choices; nothing for a deletion."""
    choices = list_chosen(conf, override)
    return f"{override.get_key_element()}={choices[0]}" if choices else ""


def list_places(conf: Path) -> dict[str, str]:
    """List the places where a group may be chosen again, as `GROUP@PLACE`, with the choice that has each."""
    found = {}
    for path in sorted(conf.glob("*/*.yaml")):
        group = path.parent.name
        for again, name in PLACE.findall(path.read_text(encoding="utf-8")):
            found[f"{again}@{group}.{name}"] = f"{group}={path.stem}"
    return found


def check_places(conf: Path, name: str, choices: Sequence[str], placed: Iterable[Override]) -> None:
    """Check places, such as `attention@model.cross`, in overrides.

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
        known = {p: choice for p, choice in list_places(conf).items() if p.startswith(f"{override.key_or_group}@")}
        if override.is_add():
            if key in runtime.choices:
                raise ValueError(f"{key} needs no +: {str(override.input_line).lstrip('+')}")
        elif key not in runtime.choices:
            here = [place for place in known if place in runtime.choices]
            parent = str(override.package).partition(".")[0]
            has = f"{parent}={runtime.choices[parent]}" if parent in runtime.choices else "the config"
            near = here or [f"{place} with {choice}" for place, choice in known.items()]
            raise ValueError(f"{has} has no place {key}{_suggest(key, here)} Available: {', '.join(near)}")


def check_place_syntax(known: Mapping[str, str], override: Override) -> None:
    """Raise a ValueError for keys such as `attention.cross=topk` if `attention@model.cross=topk` is meant."""
    key, value = override.key_or_group, str(override.input_line).partition("=")[2]
    for place, choice in known.items():
        group, _, node = place.partition("@")
        inside = f"{group}.{node.rpartition('.')[2]}"
        if key == inside or (key == node and any(isinstance(v, str) for v in list_values(override))):
            raise ValueError(f"{key} is not a choice of {group}; write {place}={value} (with {choice})")
        if key.startswith(f"{inside}."):
            raise ValueError(f"{key} is not a key; write {place}=... {node}{key.removeprefix(inside)}={value}")


def check_choice_syntax(conf: Path, config: DictConfig, override: Override) -> None:
    """Raise a ValueError for a key such as `trainer.gpu` if `trainer=gpu` is meant."""
    group, _, choice = override.key_or_group.partition(".")
    if is_group(conf, group) and choice in list_choices(conf, group) and choice not in (config.get(group) or {}):
        raise ValueError(f"{group}.{choice} is not a key; {choice} is a choice: write {group}={choice}")


def compose_choice(conf: Path, group: str, choice: str) -> DictConfig:
    """Compose the node of a choice of a group.

    Raises:
        ValueError: The group has no such choice.
    """
    check_choice(conf, group, choice)
    node: DictConfig = compose_config(conf, "train", [f"{group}={choice}"])[group]
    return node


def check_choice(conf: Path, group: str, choice: str) -> None:
    """Raise a ValueError unless the folder `conf` has the file for a choice of a group."""
    known = list_choices(conf, group)
    if choice not in known:
        own = f"A choice of your own is a file {conf.name}/{group}/{choice}.yaml"
        page = ", see docs/adding.md" if group == "attention" else ""
        raise ValueError(
            f"there is no {group}={choice}{_suggest(choice, known)} Available: {', '.join(known)}. {own}{page}"
        )


def list_choices(conf: Path, group: str) -> list[str]:
    """List the choices of a group of the folder `conf`."""
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))


def check_key(config: DictConfig, key: str) -> None:
    """Raise a ValueError unless `config` has the dotted key."""
    known = sorted(walk_keys(OmegaConf.to_container(config, resolve=False)))
    if key in known:
        return
    parent, _, last = key.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent and "._" not in f".{k}"]
    if siblings:
        inside = f"{parent}." if parent else ""
        deeper = [k for k in known if k.startswith(inside) and k.rpartition(".")[2] == last]
        if deeper:
            raise ValueError(f"{parent or 'the config'} has no key {last!r}; did you mean {' or '.join(deeper[:3])}?")
        hint = _suggest(last, siblings)
        raise ValueError(
            f"{parent or 'the config'} has no key {last!r}{hint} It has: {', '.join(siblings)}. (+{key}=... adds a key)"
        )
    raise ValueError(f"there is no key {key!r}{_suggest(key, known)} (+{key}=... adds a key)")


def check_deletion(config: DictConfig, override: Override) -> None:
    """Raise a ValueError if an override deletes what every command needs: a part of the config, or its key."""
    key = override.key_or_group
    first, _, rest = key.partition(".")
    part = isinstance(OmegaConf.to_container(config, resolve=False)[first], dict)  # type: ignore[index, call-overload]
    if override.is_delete() and (not part or not rest or first == "run"):
        raise ValueError(f"{key} cannot be deleted; leave it, or set it by {key}=...")
    if part and not rest and None in list_values(override):
        raise ValueError(f"{key} holds entries by name, and cannot be null; set one of them, or leave it")


def list_values(override: Override) -> list[Any]:
    """List the values that an override gives to its key: several in a sweep over choices or a range."""
    if override.is_sweep_override():
        return list(override.sweep_iterator()) if override.is_discrete_sweep() else []
    return [] if override.is_delete() else [override.value()]


def check_type(config: DictConfig, key: str, value: Any) -> None:
    """Raise a ValueError if a value has another type than in `config`, such as a word instead of a number.

    Ranges are checked by whoever uses the value; types can be checked before anything heavy is imported.
    """
    known: Any = OmegaConf.to_container(config, resolve=False)
    for part in key.split("."):
        known = known[part]
    if value is None or key in ANY_TYPE or (isinstance(value, str) and "${" in value):
        return
    if DROPIN_VALUES.fullmatch(key):
        like = known[0] if isinstance(known, list) else known
        for each in value if isinstance(value, list) else [value]:
            _check_value(key, each, like)
    else:
        _check_value(key, value, known)


def _check_value(key: str, value: Any, known: Any) -> None:
    if isinstance(known, dict) and not isinstance(value, dict):
        has = f"; set one of {', '.join(f'{key}.{name}' for name in known)}" if known else ""
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


def walk_keys(node: Any, prefix: str = "") -> Iterable[str]:
    """Yield the dotted names of every entry of nested dicts."""
    if isinstance(node, dict):
        for key, child in node.items():
            yield f"{prefix}{key}"
            yield from walk_keys(child, f"{prefix}{key}.")


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else "."
