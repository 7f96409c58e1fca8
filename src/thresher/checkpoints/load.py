"""Read checkpoints, exports and files of weights, executing nothing."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from thresher.checkpoints import files
from thresher.checkpoints.exports import read_export
from thresher.checkpoints.format import BEST, CLASSES, CONFIG, FOLDER, LAST, RECORD, STATE, check_version, is_export
from thresher.checkpoints.validate import check_archive, check_classes, check_state

# What damaged and hostile files make torch.load raise besides its own errors.
UNREADABLE = (
    *(RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ImportError),
    *(AssertionError, OverflowError, MemoryError),
)


def find_checkpoint(path: Path) -> Path:
    """Find the checkpoint of a run's folder: the best, else the last; return other paths unchanged.

    Raises:
        FileNotFoundError: It is a folder without any.
    """
    if not path.is_dir() or is_export(path):
        return path
    for name in (BEST, LAST):
        if (path / FOLDER / name).is_file():
            return path / FOLDER / name
    raise FileNotFoundError(
        f"{path} is neither the folder of a run with checkpoints/best.ckpt or last.ckpt, nor that of an export with "
        "model.safetensors and config.json"
    )


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of this project, or the folder of an export, onto the CPU.

    Raises:
        FileNotFoundError: There is no such file; the message names those nearby.
        ValueError: It does not fit its checksum, is not readable as weights, is not one of ours, or is of a later
            version.
    """
    path = Path(path)
    return read_export(path) if is_export(path) else check_checkpoint(read_weights(path), path)


def check_checkpoint(checkpoint: Any, path: Path) -> dict[str, Any]:
    """Check that a file is a checkpoint of train.py, and return its content.

    Raises:
        ValueError: It does not.
    """
    record = checkpoint.get(RECORD) if isinstance(checkpoint, dict) else None
    if not isinstance(record, dict) or not {CONFIG, CLASSES} <= record.keys() or STATE not in checkpoint:
        raise ValueError(f"{path} was not written by this project's train.py: it carries no config to rebuild from")
    check_version(record, path)
    check_classes(record[CLASSES], path)
    return {**checkpoint, STATE: check_state(checkpoint[STATE], path)}


def read_weights(path: Path) -> Any:
    """Read an untrusted file of torch.save onto the CPU, executing nothing.

    Raises:
        FileNotFoundError: There is no such file; the message names those nearby.
        ValueError: It does not fit its checksum, or is not readable as weights.
    """
    if not path.is_file():
        raise files.build_not_found_error(path)
    if damage := files.describe_damage(path):
        raise ValueError(f"{path} cannot be read: {damage}. The file is truncated or damaged; use another one")
    check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *UNREADABLE) as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ValueError(
            f"{path} cannot be read as weights: the file is damaged or holds more than weights ({reason})"
        ) from error


def read_any_weights(path: Path) -> Any:
    """Read a file of weights, of safetensors or of torch.save.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not readable as weights.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return read_weights(path)
    try:
        return load_file(path)
    except (SafetensorError, *UNREADABLE) as error:
        raise ValueError(f"{path} cannot be read as weights: the file is damaged ({error})") from error
