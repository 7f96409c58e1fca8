"""A trained network, rebuilt from what a run, a checkpoint or an export says of it, and nothing else."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from thresher.checkpoint import RECORD, load, load_weights
from thresher.exported import is_export
from thresher.trust import allowed_targets, checked_config

PROJECT_CONF = Path(__file__).parents[2] / "conf"


def load_model(path: str | Path, *, conf: str | Path | None = None) -> nn.Module:
    """Load a trained network for use: in evaluation mode, on the CPU, thresholds included.

    The file may come from a stranger: nothing of it is executed. The network is built by functions that the files in
    `conf` name for models and mechanisms; a file that names anything else is refused before that is imported.

    Args:
        path: A folder that thresher.export wrote, the folder of a run, whose best checkpoint is taken, or a checkpoint.
        conf: Folder of configs; that of this project by default.

    Raises:
        FileNotFoundError: There is nothing of these at `path`, or no configs in `conf`.
        ValueError: The file is damaged, names what is not ours, or does not fit together.
    """
    source = checkpoint_of(Path(path))
    return network(load(source), Path(conf) if conf is not None else PROJECT_CONF, source)


def checkpoint_of(path: Path) -> Path:
    """Return the checkpoint to take from a run's folder: the best, or else the last; other paths stay as they are.

    Raises:
        FileNotFoundError: It is a folder without any.
    """
    if not path.is_dir() or is_export(path):
        return path
    for name in ("best.ckpt", "last.ckpt"):
        if (path / "checkpoints" / name).is_file():
            return path / "checkpoints" / name
    raise FileNotFoundError(
        f"{path} is neither the folder of a run with checkpoints/best.ckpt or last.ckpt, nor that of an export with "
        "model.safetensors and config.json"
    )


def network(checkpoint: Mapping[str, Any], conf: Path, source: str | Path) -> nn.Module:
    """Build the network of a checkpoint, with its weights, in evaluation mode.

    Raises:
        FileNotFoundError: There are no configs to say what may be built.
        ValueError: The checkpoint names what `conf` does not, or does not fit together.
    """
    if not (conf / "train.yaml").is_file():
        raise FileNotFoundError(
            f"there is no {conf / 'train.yaml'}: the configs say what may be built; name their folder by conf="
        )
    record = checkpoint[RECORD]
    config: Any = OmegaConf.to_container(checked_config(record["config"], conf, source))
    arguments = record.get("model_arguments")
    if not isinstance(arguments, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(
            f"{source} does not say what its network must know of its data: it was written before checkpoints did. "
            "python eval.py ckpt=... still evaluates it, with the data at hand"
        )
    model = dict(config["model"])
    if "pretrained" in model:
        model["pretrained"] = False  # the weights are here
    try:
        with torch.random.fork_rng(devices=[]):
            net: nn.Module = _made(model, allowed_targets(conf), "model", source)(**arguments)
    except (TypeError, RuntimeError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(f"the network that {source} describes cannot be built: {error}") from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"what {source} describes is no network but {type(net).__name__}: refused")
    # A task would hold it under this name.
    load_weights(nn.ModuleDict({"net": net}), checkpoint["state_dict"], other_attention=False)
    return net.eval()


def _made(node: Any, allowed: Mapping[str, set[str]], part: str, source: str | Path) -> Any:
    """Bind what a node of the config sets to the function or class that it names; mechanisms lie inside models."""
    if isinstance(node, list):
        return [_made(child, allowed, part, source) for child in node]
    if not isinstance(node, dict):
        return node
    own = {key: _made(child, allowed, "attention", source) for key, child in node.items() if not key.startswith("_")}
    if "_target_" not in node:
        if part == "model":
            raise ValueError(f"the config stored in {source} does not say what its model is: refused")
        return own
    target = node["_target_"]
    if target not in allowed[part]:
        raise ValueError(f"{source} asks to build {target!r} as {part}: refused")
    return partial(resolve_name(target), **own)
