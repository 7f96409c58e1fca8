"""A model by its name, from files of this machine: nothing is downloaded."""

import difflib
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from thresher.checkpoints.format import is_saved_by_transformers
from thresher.checkpoints.rebuild import load_model
from thresher.config.packages import SCHEME, resolve_path
from thresher.hosts.wrapped import get_model


class Network(NamedTuple):
    """A model, and what is known of it.

    Attributes:
        model: In evaluation mode.
        trained: Whether it has weights of its own, not random ones.
        example_inputs: Inputs for hosts that watch it; None where none are known.
    """

    model: nn.Module
    trained: bool = True
    example_inputs: Any = None

    @property
    def note(self) -> str:
        """What to say of its weights."""
        return "" if self.trained else " with random weights"


def load_network(name: str, conf: Path) -> Network:
    """Load the model that a name stands for.

    Args:
        name: A run, checkpoint or export; a folder of transformers, or `package:NAME/FOLDER` inside an installed
            package; or a name of timm's.
        conf: Folder of configs; they list what a checkpoint may name.

    Raises:
        ValueError: There is no such model, or its files are damaged.
        FileNotFoundError: The package or its folder is not there.
    """
    path = Path(resolve_path(name))
    if name.startswith(SCHEME) or (path.exists() and is_saved_by_transformers(path)):
        return Network(_load_from_folder(path))
    if path.exists():
        return Network(get_model(load_model(path, conf=conf)))
    if timm.is_model(name):
        model = timm.create_model(name, pretrained=False).eval()
        size = timm.data.resolve_model_data_config(model)["input_size"]
        return Network(model, trained=False, example_inputs=torch.zeros(2, *size))
    close = difflib.get_close_matches(name, timm.list_models(), n=2)
    hint = f"; did you mean {' or '.join(close)} of timm's?" if close else "."
    raise ValueError(
        f"there is no network {name!r} on this machine{hint} network= names a run, a checkpoint, an export, a folder "
        "of transformers or a model of timm's, and downloads nothing"
    )


def _load_from_folder(folder: Path) -> nn.Module:
    try:
        from thresher.models.huggingface import load_local_model
    except ImportError as error:
        raise ValueError(f"{folder} is a model of transformers: pip install 'thresher[hf]'") from error
    model: nn.Module = load_local_model(folder)
    return model
