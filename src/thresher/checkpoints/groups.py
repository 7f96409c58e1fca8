"""The groups of a config by name: `{name: latte, arguments: {...}}` in place of import paths.

A name is the name of a file in conf/GROUP/. That file says what is imported; a stored config holds keyword arguments
and nothing else. So a checkpoint from a stranger can ask for nothing but what the local configs name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from thresher.checkpoints.format import ARGUMENTS, GROUPS, NAME
from thresher.checkpoints.validate import check_plain

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
FOLLOWS = "${attention}"  # value of a key of a model that takes the mechanism of the run
NAMED = (*GROUPS, "callbacks")  # callbacks are not rebuilt, but belong to the command that trains such a network
OMITTED = ("logger",)  # belongs to the run that wrote the checkpoint
Keys = dict[tuple[str, ...], dict[str, Any]]


@dataclass(frozen=True)
class Choice:
    """One file of a group.

    Attributes:
        name: Its name.
        arguments: Its keyword arguments.
        hydra_keys: The keys of Hydra in it, such as `_target_`, by the path of the node that they stand in.
        slots: The keys that take a mechanism, with the value where nothing else is chosen.
    """

    name: str
    arguments: Mapping[str, Any]
    hydra_keys: Keys
    slots: Mapping[str, str | None]


def list_choices(conf: Path, group: str) -> list[str]:
    """List the names of a group."""
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))


def read_choice(conf: Path, group: str, name: str) -> Choice:
    """Read the file of a name that `list_choices` lists."""
    node, slots = _read_node(conf, group, name)
    slots |= {key: FOLLOWS for key, value in node.items() if value == FOLLOWS}
    arguments, hydra_keys = _split({key: value for key, value in node.items() if key not in slots})
    return Choice(name, arguments, hydra_keys, slots)


def _read_node(conf: Path, group: str, name: str) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Read a file and the files of its defaults list; return its node, and the slots that the list names."""
    own = yaml.load((conf / group / f"{name}.yaml").read_text(encoding="utf-8"), Loader=LOADER) or {}
    node: dict[str, Any] = {}
    slots: dict[str, str | None] = {}
    for default in own.pop("defaults", []):
        if isinstance(default, Mapping):
            slots |= {key.partition("@")[2]: None for key in default if str(key).startswith("/attention@")}
        elif default != "_self_":
            base, more = _read_node(conf, group, default)
            node, slots = _merge(node, base), slots | more
    return _merge(node, own), slots


def _merge(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _split(node: Mapping[str, Any], path: tuple[str, ...] = ()) -> tuple[dict[str, Any], Keys]:
    """Split a node into its keyword arguments and the keys of Hydra, by their path."""
    own = {key: value for key, value in node.items() if _is_hydra_key(key)}
    hydra_keys: Keys = {path: own} if own else {}
    arguments: dict[str, Any] = {}
    for key, value in node.items():
        if _is_hydra_key(key):
            continue
        arguments[key] = value
        if isinstance(value, Mapping):
            arguments[key], below = _split(value, (*path, str(key)))
            hydra_keys |= below
    return arguments, hydra_keys


def _is_hydra_key(key: Any) -> bool:
    return isinstance(key, str) and key.startswith("_") and key.endswith("_")


# Storing


def describe_config(config: Mapping[str, Any], conf: Path) -> tuple[dict[str, Any], list[str]]:
    """Describe a resolved config by names.

    Returns:
        The config with `{name, arguments}` for each group, without loggers; and the groups that are left out although
        a checkpoint needs them, because no file of `conf` names what they build.
    """
    described: dict[str, Any] = {}
    unnamed = []
    for key, value in config.items():
        if key in OMITTED:
            continue
        if key not in NAMED:
            described[key] = value
        elif not isinstance(value, Mapping) or not (group := describe_group(key, value, conf, config["attention"])):
            unnamed += [key] if key in GROUPS else []
        else:
            described[key] = group
    return described, unnamed


def describe_group(
    group: str, node: Mapping[str, Any], conf: Path, attention: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Describe a node by the file that builds the same and differs in the fewest arguments; None without such a file.

    Args:
        group: The group of the node.
        node: The resolved node.
        conf: The folder of the configs.
        attention: The resolved node of the mechanism of the run; slots that hold the same are left out.
    """
    best: tuple[int, dict[str, Any]] | None = None
    for name in list_choices(conf, group):
        choice = read_choice(conf, group, name)
        arguments, hydra_keys = _split({key: value for key, value in node.items() if key not in choice.slots})
        if not _builds_same(arguments, hydra_keys, choice):
            continue
        slots = _describe_slots(choice, node, conf, attention)
        if slots is None:
            continue
        keys = arguments.keys() | choice.arguments.keys()
        differ = sum(arguments.get(key, ...) != choice.arguments.get(key, ...) for key in keys)
        if best is None or differ < best[0]:
            best = differ, {NAME: name, ARGUMENTS: arguments | slots}
    return None if best is None else best[1]


def _builds_same(arguments: Mapping[str, Any], hydra_keys: Keys, choice: Choice) -> bool:
    """Tell whether a node builds the same as a choice, except nodes deleted or replaced by a value."""
    if any(choice.hydra_keys.get(path) != keys for path, keys in hydra_keys.items()):
        return False
    missing = choice.hydra_keys.keys() - hydra_keys.keys()
    return not any(True for path in missing for _ in _find_nodes(dict(arguments), path))


def _describe_slots(
    choice: Choice, node: Mapping[str, Any], conf: Path, attention: Mapping[str, Any]
) -> dict[str, Any] | None:
    slots: dict[str, Any] = {}
    for key, default in choice.slots.items():
        value = node.get(key)
        if value is None or (default == FOLLOWS and value == attention):
            continue
        mechanism = describe_group("attention", value, conf, attention)
        if mechanism is None:
            return None
        slots[key] = mechanism
    return slots


# Reading back


def restore_config(stored: Any, conf: Path, source: str | Path) -> dict[str, Any]:
    """Restore a config for Hydra from one that holds its groups by name.

    Raises:
        ValueError: It is not made of plain values, or a group has no such name.
    """
    check_plain(stored, source)
    return {
        key: restore_group(key, value, conf, source) if key in NAMED else value
        for key, value in stored.items()
        if key not in OMITTED
    }


def restore_group(group: str, stored: Any, conf: Path, source: str | Path) -> dict[str, Any]:
    """Restore the node of a group: what its file builds, with the stored arguments.

    Raises:
        ValueError: It is not a name with arguments, or there is no such name.
    """
    if not isinstance(stored, dict) or stored.keys() != {NAME, ARGUMENTS} or not isinstance(stored[ARGUMENTS], dict):
        raise ValueError(f"the config stored in {source} has no name and arguments for {group}: refused")
    known = list_choices(conf, group)
    if stored[NAME] not in known:
        raise ValueError(
            f"{source} asks for {group} {stored[NAME]!r}, which is not a file of {conf / group}: refused. "
            f"There are: {', '.join(known) or 'none'}"
        )
    choice = read_choice(conf, group, stored[NAME])
    node = {key: value for key, value in stored[ARGUMENTS].items() if key not in choice.slots}
    for path, hydra_keys in choice.hydra_keys.items():
        for place in _find_nodes(node, path):
            place.update(hydra_keys)
    for key, default in choice.slots.items():
        mechanism = stored[ARGUMENTS].get(key)
        node[key] = default if mechanism is None else restore_group("attention", mechanism, conf, source)
    return node


def _find_nodes(node: dict[str, Any], path: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Replace the node at a path by a copy and yield it; nothing if another value is there."""
    for key in path:
        if not isinstance(node.get(key), dict):
            return
        node[key] = dict(node[key])
        node = node[key]
    yield node
