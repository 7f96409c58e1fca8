"""The folder of an export: weights as safetensors, and as JSON the record that rebuilds their network."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from thresher.checkpoints.format import CLASSES, CONFIG, DESCRIPTION, NETWORK, RECORD, STATE, WEIGHTS, check_version
from thresher.checkpoints.validate import check_classes


def write_export(folder: Path, state: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write the weights of a network, and the record of its checkpoint, into a folder."""
    # Tied weights share their memory, which safetensors does not store.
    own = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(own, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / DESCRIPTION).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_export(folder: Path) -> dict[str, Any]:
    """Read an export as a checkpoint, executing nothing.

    Raises:
        ValueError: A file is damaged or incomplete.
    """
    try:
        record = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / DESCRIPTION} cannot be read: {error}") from error
    if not isinstance(record, dict) or not {CONFIG, CLASSES} <= record.keys():
        raise ValueError(f"{folder / DESCRIPTION} was not written by thresher.export: it says nothing of a network")
    check_version(record, folder)
    check_classes(record[CLASSES], folder)
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: the file is damaged ({error})") from error
    return {STATE: {f"{NETWORK}{name}": value for name, value in state.items()}, RECORD: record}
