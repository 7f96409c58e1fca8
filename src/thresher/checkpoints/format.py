"""The format of a checkpoint and of an export: every key, every file name, and the version."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

# Keys of a checkpoint.
RECORD = "thresher"  # rebuilds its network
STATE = "state_dict"
POSITION = "position"  # of the training, in a snapshot
NETWORK = "net."  # the names of weights start with it in a checkpoint, and not in an export

# Keys of the record.
VERSION, CONFIG, CLASSES, MODEL_ARGUMENTS, LOGGERS = "version", "config", "classes", "model_arguments", "loggers"

# A group of the config is stored as the name of its file in conf/GROUP/ and its keyword arguments.
GROUPS = ("attention", "model", "data", "task", "optimizer", "scheduler", "compute", "trainer")
NAME, ARGUMENTS = "name", "arguments"

# Files of a run, and of an export.
FOLDER = "checkpoints"
BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
TUNING = "tuning.pt"  # where a tuning stands
TUNING_LOGGERS = "tuning.json"  # ids of the runs of loggers that it continues
WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"


def build_record(
    config: Mapping[str, Any],
    classes: Sequence[str],
    model_arguments: Mapping[str, Any],
    loggers: Mapping[str, str],
) -> dict[str, Any]:
    """Build the record of a checkpoint.

    Args:
        config: The config with its groups by name, as `groups.describe_config` returns it.
        classes: Names of the classes, empty where the data have none.
        model_arguments: The keyword arguments of the network that come from the data.
        loggers: Ids of the runs of loggers, to continue them.
    """
    return {
        VERSION: version("thresher"),
        CONFIG: dict(config),
        CLASSES: list(classes),
        MODEL_ARGUMENTS: dict(model_arguments),
        LOGGERS: dict(loggers),
    }


def is_export(path: Path) -> bool:
    """Tell whether a path is the folder of an export."""
    return (path / WEIGHTS).is_file() and (path / DESCRIPTION).is_file()


def check_version(record: Mapping[str, Any], source: Path) -> None:
    """Refuse a file of a later version, where names may have other meanings.

    Raises:
        ValueError: The file is of a later version; the message names both.
    """
    written = record.get(VERSION)
    try:
        later = isinstance(written, str) and Version(written) > Version(version("thresher"))
    except InvalidVersion:
        later = False
    if later:
        raise ValueError(
            f"{source} was written by thresher {written}, and this is {version('thresher')}: install the later one"
        )


def is_saved_by_transformers(path: Path) -> bool:
    """Tell whether a path is a folder that transformers wrote, and not an export of this project.

    Raises:
        ValueError: Its description cannot be read.
    """
    if not (path / DESCRIPTION).is_file():
        return False
    try:
        told = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / DESCRIPTION} cannot be read: {error}") from error
    return isinstance(told, Mapping) and "model_type" in told and not (is_export(path) and "classes" in told)
