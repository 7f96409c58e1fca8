"""Rebuild the config and the network of a checkpoint: the only way from a stored name to an object."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from thresher.checkpoints.format import CONFIG, GROUPS, MODEL_ARGUMENTS, RECORD, STATE
from thresher.checkpoints.groups import list_choices, read_choice, restore_config
from thresher.checkpoints.load import find_checkpoint, load_checkpoint
from thresher.checkpoints.weights import load_weights

PROJECT_CONF = Path(__file__).parents[3] / "conf"
GENERATED = ("data", "listops")  # the data set that is generated if it is missing


def load_model(path: str | Path, *, conf: str | Path | None = None) -> nn.Module:
    """Load a trained network for use: in evaluation mode, on the CPU, thresholds included.

    The file may come from a stranger: nothing of it is executed. It names files in `conf`, and these say what is
    built.

    Args:
        path: A folder that thresher.export wrote, the folder of a run, whose best checkpoint is taken, or a checkpoint.
        conf: Folder of configs; that of this project by default.

    Raises:
        FileNotFoundError: There is nothing of these at `path`, or no configs in `conf`.
        ValueError: The file is damaged, names what `conf` does not have, or does not fit together.
    """
    source = find_checkpoint(Path(path))
    return rebuild_network(load_checkpoint(source), Path(conf) if conf is not None else PROJECT_CONF, source)


def rebuild_config(checkpoint: Mapping[str, Any], conf: Path, source: str | Path) -> DictConfig:
    """Rebuild the config of a checkpoint so that Hydra can instantiate it; it downloads nothing and writes nowhere.

    Pretrained weights are not loaded, since the checkpoint has its own. ListOps is generated in the folder of `conf`
    unless the stored one exists.

    Raises:
        FileNotFoundError: There are no configs in `conf`.
        ValueError: The stored config lacks a group, or holds what `groups.restore_config` refuses.
    """
    if not (conf / "train.yaml").is_file():
        raise FileNotFoundError(
            f"there is no {conf / 'train.yaml'}: the configs say what may be built; name their folder by conf="
        )
    config = restore_config(checkpoint[RECORD][CONFIG], conf, source)
    if missing := [group for group in GROUPS if group not in config]:
        raise ValueError(f"the config stored in {source} does not say what its {missing[0]} is: refused")
    data = config["data"]
    if data.get("download"):
        data["download"] = False
    if GENERATED[1] in list_choices(conf, GENERATED[0]):
        generated = read_choice(conf, *GENERATED)
        same = data["_target_"] == generated.hydra_keys[()]["_target_"]
        if same and not Path(str(data.get("root"))).is_dir():
            data["root"] = generated.arguments["root"]
    if "pretrained" in config["model"]:
        config["model"]["pretrained"] = False
    return OmegaConf.create(config)


def rebuild_network(checkpoint: Mapping[str, Any], conf: Path, source: str | Path) -> nn.Module:
    """Rebuild the network of a checkpoint with its weights, in evaluation mode.

    Raises:
        FileNotFoundError: There are no configs in `conf`.
        ValueError: The checkpoint names what `conf` does not have, or does not fit together.
    """
    config = rebuild_config(checkpoint, conf, source)
    arguments = checkpoint[RECORD].get(MODEL_ARGUMENTS)
    if not isinstance(arguments, dict) or not all(isinstance(name, str) for name in arguments):
        raise ValueError(f"{source} does not say what its network must know of its data: refused")
    try:
        with torch.random.fork_rng(devices=[]):
            net = instantiate(config.model, _partial_=True, _convert_="all")(**arguments)
    except (TypeError, RuntimeError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(f"the network that {source} describes cannot be built: {error}") from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"{source} describes {type(net).__name__}, not a network: refused")
    # Its name in a task.
    load_weights(nn.ModuleDict({"net": net}), checkpoint[STATE], other_attention=False)
    return net.eval()
