"""What of a stranger's files may be believed.

A stored config names code that would be run, and files that would be read or written. It may name, in each of its
parts, only what the files of our own `conf/` name in that part; nothing of it is interpolated, and nothing written.
"""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
SPECIAL = {"_target_", "_partial_", "_convert_", "_recursive_"}  # what our own configs use of Hydra's keys
DEEPEST = 32  # levels of a config; ours have 6
MOST = 100_000  # entries of a config; ours have a few hundred
PARTS = ("attention", "model", "data", "task", "optimizer", "scheduler", "compute", "trainer")


def checked_archive(path: Path) -> None:
    """Refuse a file that is no archive as torch.save writes them.

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


def checked_state(state: Any, source: str | Path) -> dict[str, Tensor]:
    """Return a stored state if it is one: names and tensors.

    Raises:
        ValueError: It holds something else.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"the weights stored in {source} are no mapping of names to tensors: refused")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{source} stores {type(value).__name__} as the weight {name!r}, not a tensor: refused")
    return dict(state)


def checked_classes(classes: Any, source: str | Path) -> list[str]:
    """Return the names of the classes of a checkpoint.

    Raises:
        ValueError: They are something else.
    """
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"the class names stored in {source} are no list of strings: refused")
    return classes


def checked_config(config: Any, conf: Path, source: str | Path) -> DictConfig:
    """Return a stored config as one to instantiate from, if each part names only targets that `conf` names there.

    What is checked is the very object that is returned: OmegaConf would parse a string, and turn tuples into lists.

    Raises:
        ValueError: It names another target, wants to be interpolated, or is not made of plain values.
    """
    if type(config) is not dict:
        raise ValueError(f"the config stored in {source} is not a mapping: refused")
    for count, (depth, _, _) in enumerate(entries(config)):
        if depth > DEEPEST or count > MOST:
            raise ValueError(f"the config stored in {source} has over {DEEPEST} levels or {MOST} entries: refused")
    try:
        checked = OmegaConf.create(config)
        plain: Any = OmegaConf.to_container(checked, resolve=False)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ValueError(f"the config stored in {source} is not made of plain values: refused ({error})") from error
    for _, key, value in entries(plain):
        if isinstance(value, str) and "${" in value:
            raise ValueError(f"the config stored in {source} holds an interpolation, {value!r}: refused")
        if isinstance(key, str) and key.startswith("_") and key.endswith("_") and key not in SPECIAL:
            raise ValueError(f"the config stored in {source} has a key {key!r}, which no config of ours has: refused")
    allowed = allowed_targets(conf)
    for part, node in plain.items():
        own = allowed.get(str(part), set())
        nested = own | allowed["attention"] if part == "model" else own
        for depth, key, value in entries(node):
            if key == "_target_":
                _check_target(value, own if part != "model" or depth == 1 else nested, str(part), conf, source)
    return checked


def run_config(config: Any, conf: Path, source: str | Path) -> DictConfig:
    """Return a stored config as that of a run to repeat, with what would write taken out of it.

    Downloads are off, and ListOps is generated where the stored config says only if that folder exists.

    Raises:
        ValueError: See `checked_config`; or a part of a run is missing, or has no target.
    """
    checked = checked_config(config, conf, source)
    for part in PARTS:
        node = checked.get(part)
        if not isinstance(node, DictConfig) or not isinstance(node.get("_target_"), str):
            raise ValueError(f"the config stored in {source} does not say what its {part} is: refused")
    if checked.data.get("download"):
        checked.data.download = False
    generated = yaml.load((conf / "data" / "listops.yaml").read_text(encoding="utf-8"), Loader=LOADER)
    if checked.data["_target_"] == generated["_target_"] and not Path(str(checked.data.get("root"))).is_dir():
        checked.data.root = generated["root"]
    return checked


def allowed_targets(conf: Path) -> dict[str, set[str]]:
    """Return the targets that the files of a folder of configs name, for each part of a run."""
    allowed: dict[str, set[str]] = {"attention": set()}
    for path in conf.glob("*/*.yaml"):
        text = path.read_text(encoding="utf-8")
        node = yaml.load(text, Loader=LOADER)
        whole = isinstance(node, dict) and text.startswith("# @package _global_")
        for part, child in node.items() if isinstance(node, dict) and whole else [(path.parent.name, node)]:
            targets = {value for _, key, value in entries(child) if key == "_target_"}
            allowed.setdefault(str(part), set()).update(targets)
    return allowed


def entries(node: Any) -> Iterator[tuple[int, Any, Any]]:
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
            if depth <= DEEPEST:
                waiting.append((depth + 1, child))


def _check_target(target: Any, allowed: set[str], part: str, conf: Path, source: str | Path) -> None:
    if not isinstance(target, str) or target not in allowed:
        raise ValueError(f"{source} asks to run {target!r}, which no file of {conf} names for {part}: refused")
