"""Data sets of the package `datasets`: from the hub, or from a local copy."""

from pathlib import Path
from typing import Any


def load_splits(name: str, config: str, root: str | None) -> Any:
    """Load the splits of a data set.

    Args:
        name: Name on the hub.
        config: One of its configurations.
        root: Folder that `datasets.DatasetDict.save_to_disk` wrote; None loads from the hub.

    Raises:
        ModuleNotFoundError: The package `datasets` is not installed.
        FileNotFoundError: There is no such copy, or the hub cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise ModuleNotFoundError(f"{name} needs the package datasets: pip install 'thresher[datasets]'") from error
    if root is not None:
        folder = Path(root).expanduser()
        if not (folder / "dataset_dict.json").is_file():
            raise FileNotFoundError(f"{folder} holds no data set that datasets' save_to_disk wrote")
        return datasets.load_from_disk(str(folder))
    try:
        return datasets.load_dataset(name, config)
    except (OSError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name} ({config}) cannot be loaded from the hub: {error}. Where there is a network, save a copy by "
            f"`datasets.load_dataset('{name}', '{config}').save_to_disk(FOLDER)`; then set data.root=FOLDER"
        ) from error
