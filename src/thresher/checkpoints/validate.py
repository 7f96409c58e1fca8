"""Validate untrusted files: archives, weights, class names, configs.

A stored config names the files of conf/ that say what is built, and holds keyword arguments. Arguments are plain
values: none is interpolated, and none is a node that Hydra would instantiate.
"""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

MAX_DEPTH = 32  # levels of a config; ours have 6
MAX_ENTRIES = 100_000  # entries of a config; ours have a few hundred


def check_archive(path: Path) -> None:
    """Refuse a file that is not an archive as torch.save writes them.

    Older formats go through other readers, which have had holes of their own; a compressed archive may be a bomb.

    Raises:
        ValueError: It is not one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{path} cannot be read as weights: the file is damaged or of another kind ({error})"
        ) from error
    if packed:
        raise ValueError(
            f"{path} cannot be read as weights: it is compressed ({packed[0]!r}), which torch.save never does"
        )


def check_state(state: Any, source: str | Path) -> dict[str, Tensor]:
    """Check that a stored state maps names to tensors, and return it.

    Raises:
        ValueError: It holds something else.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"the weights stored in {source} are not a mapping of names to tensors: refused")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{source} stores {type(value).__name__} as the weight {name!r}, not a tensor: refused")
    return dict(state)


def check_classes(classes: Any, source: str | Path) -> None:
    """Check that the class names of a checkpoint are strings.

    Raises:
        ValueError: They are something else.
    """
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"the class names stored in {source} are not a list of strings: refused")


def check_plain(config: Any, source: str | Path) -> None:
    """Check that a stored config is made of plain values: dicts with string keys, lists, strings, numbers, None.

    Raises:
        ValueError: It holds another type, an interpolation, a key of Hydra such as `_target_`, or has no end.
    """
    if type(config) is not dict:
        raise ValueError(f"the config stored in {source} is not a mapping: refused")
    for count, (depth, key, value) in enumerate(walk_entries(config)):
        if depth > MAX_DEPTH or count > MAX_ENTRIES:
            raise ValueError(
                f"the config stored in {source} has over {MAX_DEPTH} levels or {MAX_ENTRIES} entries: refused"
            )
        if isinstance(key, str) and key.startswith("_") and key.endswith("_"):
            raise ValueError(f"the config stored in {source} has a key {key!r}, which no stored config has: refused")
        if isinstance(value, str) and "${" in value:
            raise ValueError(f"the config stored in {source} holds an interpolation, {value!r}: refused")
        if type(key) not in (str, int) or type(value) not in (dict, list, str, int, float, bool, type(None)):
            raise ValueError(
                f"the config stored in {source} is not made of plain values: {key!r} is {type(value).__name__}: refused"
            )


def walk_entries(node: Any) -> Iterator[tuple[int, Any, Any]]:
    """Yield depth, key and value of every entry of nested mappings and sequences, without recursion."""
    waiting = [(1, node)]
    while waiting:
        depth, parent = waiting.pop()
        if isinstance(parent, Mapping):
            children = list(parent.items())
        elif isinstance(parent, (list, tuple)):
            children = list(enumerate(parent))
        else:
            continue
        for key, child in children:
            yield depth, key, child
            if depth <= MAX_DEPTH:
                waiting.append((depth + 1, child))
