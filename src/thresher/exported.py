"""The folder of an export: weights as safetensors, and as JSON what is needed to rebuild their network."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from thresher import __version__
from thresher.trust import checked_classes

RECORD = "thresher"
WEIGHTS = "model.safetensors"
DESCRIPTION = "config.json"
NETWORK = "net."  # what weights of the network begin with in a checkpoint, and do not in an export


def is_export(path: Path) -> bool:
    """Say whether a path is the folder of an export."""
    return (path / WEIGHTS).is_file() and (path / DESCRIPTION).is_file()


def write(folder: Path, state: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write the weights of a network, and the record of its checkpoint, into a folder."""
    # Tied weights share their memory, which safetensors does not store.
    own = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(own, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / DESCRIPTION).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """Read an export as the checkpoint that it was made from, executing nothing.

    Raises:
        ValueError: One of its files is damaged, or says too little.
    """
    try:
        record = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / DESCRIPTION} cannot be read: {error}") from error
    if not isinstance(record, dict) or not {"config", "classes"} <= record.keys():
        raise ValueError(f"{folder / DESCRIPTION} was not written by thresher.export: it says nothing of a network")
    check_version(record, folder)
    checked_classes(record["classes"], folder)
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: the file is damaged ({error})") from error
    return {"state_dict": {f"{NETWORK}{name}": value for name, value in state.items()}, RECORD: record}


def check_version(record: Mapping[str, Any], source: Path) -> None:
    """Refuse what a later version wrote, which may mean other things by the same names.

    Raises:
        ValueError: It was; the message names both versions.
    """
    written = record.get("version")
    try:
        later = isinstance(written, str) and Version(written) > Version(__version__)
    except InvalidVersion:
        later = False
    if later:
        raise ValueError(
            f"{source} was written by thresher {written}, and this is {__version__}: install the later one"
        )
