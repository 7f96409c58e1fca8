"""The config of a run as flat keys: paths of its own folder written as `${run.dir}`, equal parts parsed once."""

import math
import re
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from typing import Any

import yaml

Items = tuple[tuple[str, Any], ...]


class Table(tuple):
    """Pairs of a dict that stands where a value does: an empty one, or one inside a list."""


LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
BLOCK = re.compile(r"^(?=[^\s#-])", re.MULTILINE)
RUN_DIR = re.compile(r"^run:\n(?:  .*\n)*?  dir: (.+)$", re.MULTILINE)

# What tells two runs apart without making them different experiments: where they write, and what they are called.
BOOKKEEPING = ("run", "tags", "ckpt_path", "resume", "logger", "optimized_metric", "train", "test")
# What a dense network has no use for.
SPARSE_ONLY = ("attention", "model.attention", "compute", "callbacks", "optimizer.threshold_")


def read_config(text: str) -> dict[str, Any]:
    """Read a resolved config into dotted keys; an attention of the model that is the run's own is left as a reference.

    Raises:
        ValueError: It is not the YAML of a config.
    """
    folder = RUN_DIR.search(text)
    if folder:
        own = re.escape(folder.group(1))
        text = re.sub(rf"(?<=: ){own}(?=/|$)", "${run.dir}", text, flags=re.MULTILINE)
    flat: dict[str, Any] = {}
    try:
        for block in BLOCK.split(text):
            flat.update(_parsed(block))
        if folder:
            flat["run.dir"] = str(yaml.load(folder.group(1), Loader=LOADER))
    except (yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"config.yaml cannot be read: {str(error).splitlines()[0]}") from error
    return _referring(flat)


@lru_cache(maxsize=4096)
def _parsed(block: str) -> Items:
    return tuple(flatten(yaml.load(block, Loader=LOADER) or {}))


def _referring(flat: dict[str, Any]) -> dict[str, Any]:
    """Write the model's attention as a reference where it repeats the attention of the run."""
    own = {key: value for key, value in flat.items() if part_of(key, "attention")}
    copied = {key[6:]: value for key, value in flat.items() if part_of(key, "model.attention")}
    if not own or own != copied:
        return flat
    return {key: value for key, value in flat.items() if key[6:] not in own} | {"model.attention": "${attention}"}


def flatten(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and values of nested dicts; lists become tuples, so that all values compare and hash."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _frozen(value)


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_frozen(child) for child in value)
    if isinstance(value, Mapping):
        return Table((key, _frozen(child)) for key, child in value.items())
    return "nan" if isinstance(value, float) and math.isnan(value) else value


@cache
def part_of(key: str, *parts: str) -> bool:
    """Say whether a dotted key is, or lies below, one of some others; one that ends in `_` is a prefix."""
    return any(key == p or key.startswith(f"{p}." if p[-1] != "_" else p) for p in parts)


def without(config: Mapping[str, Any], *parts: str) -> Items:
    """Return the sorted entries of a config outside of some parts."""
    return tuple((key, config[key]) for key in sorted(config) if not part_of(key, *parts))
