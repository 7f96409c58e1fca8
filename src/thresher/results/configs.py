"""The config of a run as flat keys: paths of its own folder written as `${run.dir}`, equal parts parsed once."""

import math
import re
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from typing import Any

import yaml

Items = tuple[tuple[str, Any], ...]


class Table(tuple):
    """The pairs of a dict as a value: an empty dict, or one inside a list."""


LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
BLOCK = re.compile(r"^(?=[^\s#-])", re.MULTILINE)
RUN_DIR = re.compile(r"^run:\n(?:  .*\n)*?  dir: (.+)$", re.MULTILINE)

# Keys that may differ between two runs of the same experiment: names, folders and remaining steps.
BOOKKEEPING = ("run", "tags", "ckpt_path", "resume", "logger", "optimized_metric", "train", "test")
# Keys that a dense network does not use.
SPARSE_ONLY = ("attention", "model.attention", "compute", "callbacks", "optimizer.threshold_")


def read_config(text: str) -> dict[str, Any]:
    """Read a resolved config into dotted keys; write a copy of the run's attention in its model as a reference.

    Raises:
        ValueError: The text is not the YAML of a config.
    """
    folder = RUN_DIR.search(text)
    if folder:
        own = re.escape(folder.group(1))
        text = re.sub(rf"(?<=: ){own}(?=/|$)", "${run.dir}", text, flags=re.MULTILINE)
    flat: dict[str, Any] = {}
    try:
        for block in BLOCK.split(text):
            flat.update(_parse_block(block))
        if folder:
            flat["run.dir"] = str(yaml.load(folder.group(1), Loader=LOADER))
    except (yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"config.yaml cannot be read: {str(error).splitlines()[0]}") from error
    return _replace_copy(flat)


@lru_cache(maxsize=4096)
def _parse_block(block: str) -> Items:
    return tuple(flatten(yaml.load(block, Loader=LOADER) or {}))


def _replace_copy(flat: dict[str, Any]) -> dict[str, Any]:
    """Replace the attention of the model by a reference where it repeats the attention of the run."""
    own = {key: value for key, value in flat.items() if is_part_of(key, "attention")}
    copied = {key[6:]: value for key, value in flat.items() if is_part_of(key, "model.attention")}
    if not own or own != copied:
        return flat
    return {key: value for key, value in flat.items() if key[6:] not in own} | {"model.attention": "${attention}"}


def flatten(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and values of nested dicts; lists become tuples, so that all values can be hashed."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _freeze(value)


def _freeze(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_freeze(child) for child in value)
    if isinstance(value, Mapping):
        return Table((key, _freeze(child)) for key, child in value.items())
    return "nan" if isinstance(value, float) and math.isnan(value) else value


@cache
def is_part_of(key: str, *parts: str) -> bool:
    """Tell whether a dotted key equals one of `parts` or lies below it; a part that ends in `_` is a prefix."""
    return any(key == p or key.startswith(f"{p}." if p[-1] != "_" else p) for p in parts)


def exclude(config: Mapping[str, Any], *parts: str) -> Items:
    """Exclude parts of a config; return the other entries, sorted."""
    return tuple((key, config[key]) for key in sorted(config) if not is_part_of(key, *parts))
