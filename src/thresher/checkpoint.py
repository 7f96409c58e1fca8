"""Checkpoints: weights, and what is needed to rebuild the network that they belong to.

A checkpoint carries the resolved config of its run as plain values, so that it can be rebuilt without the
command that made it. It may come from a stranger: it is loaded with `weights_only=True`, and `trust.py` says what of
its config may be believed.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from thresher import exported, files
from thresher.attention.base import Mechanism
from thresher.exported import RECORD
from thresher.trust import checked_archive, checked_classes, checked_state

# What damaged and hostile files make torch.load raise besides its own errors.
UNREADABLE = (
    *(RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ImportError),
    *(AssertionError, OverflowError, MemoryError),
)

PREFIXES = re.compile(r"(^|\.)(_orig_mod\.|module\.)+")  # of torch.compile and DDP
HOLDERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
)  # where other libraries' checkpoints keep their weights


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project, or the folder of an export, onto the CPU, executing nothing.

    Raises:
        FileNotFoundError: There is no such file; the message names those nearby.
        ValueError: It does not fit its checksum, is not readable as weights, is not one of ours, or is of a later
            version.
    """
    path = Path(path)
    return exported.read(path) if exported.is_export(path) else _own(read(path), path)


def _own(checkpoint: Any, path: Path) -> dict[str, Any]:
    record = checkpoint.get(RECORD) if isinstance(checkpoint, dict) else None
    if not isinstance(record, dict) or not {"config", "classes"} <= record.keys() or "state_dict" not in checkpoint:
        raise ValueError(f"{path} was not written by this project's train.py: it carries no config to rebuild from")
    exported.check_version(record, path)
    checkpoint["state_dict"] = checked_state(checkpoint["state_dict"], path)
    checked_classes(record["classes"], path)
    whole: dict[str, Any] = checkpoint
    return whole


def read(path: Path) -> Any:
    """Read a file of weights onto the CPU, executing nothing, whoever wrote it.

    Raises:
        FileNotFoundError: There is no such file; the message names those nearby.
        ValueError: It does not fit its checksum, or is not readable as weights.
    """
    if not path.is_file():
        raise files.no_checkpoint(path)
    if damage := files.damage(path):
        raise ValueError(f"{path} cannot be read: {damage}. The file is truncated or damaged; take another one")
    checked_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *UNREADABLE) as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ValueError(
            f"{path} cannot be read as weights: the file is damaged or holds more than weights ({reason})"
        ) from error


def begin_from(task: nn.Module, path: str | Path, classes: int | None) -> list[str]:
    """Load the weights that a training begins with.

    Args:
        task: The task to load into.
        path: A checkpoint or an export of this project; or a file of the network's weights alone, under the names that
            its library gives them, such as timm writes: .safetensors, or what torch.save made of a state dict, by
            itself or in an entry of that name.
        classes: Number of logits of a classifier.

    Returns:
        The weights of a file of weights alone that were for another number of classes and were left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, holds more than weights, or does not fit the network.
    """
    path = Path(path)
    stored = exported.read(path) if exported.is_export(path) else _read_any(path)
    if isinstance(stored, dict) and RECORD in stored:
        load_weights(task, _own(stored, path)["state_dict"], other_attention=True)
        return []
    holder = next((name for name in HOLDERS if isinstance(stored, dict) and name in stored), None)
    state = checked_state(stored if holder is None else stored[holder], path)
    state = {exported.NETWORK + _bare(name): value for name, value in state.items()}
    own = task.state_dict()
    anew = [
        name
        for name, value in state.items()
        if name in own and value.shape != own[name].shape == (classes, *value.shape[1:])
    ]
    load_weights(task, state | {name: own[name] for name in anew}, other_attention=True)
    return anew


def _read_any(path: Path) -> Any:
    if path.suffix != ".safetensors" or not path.is_file():
        return read(path)
    try:
        return load_file(path)
    except (SafetensorError, *UNREADABLE) as error:
        raise ValueError(f"{path} cannot be read as weights: the file is damaged ({error})") from error


def load_weights(task: nn.Module, state: Mapping[str, Tensor], other_attention: bool) -> None:
    """Load a stored state into a task, whatever wrapped the network when it was stored.

    Hashes that were drawn for other settings of a mechanism, such as another number of them, give way to its own.

    Args:
        task: The task to load into.
        state: The stored state; `_orig_mod.` (torch.compile) and `module.` (DDP) in its keys are understood.
        other_attention: Whether the stored run used another mechanism, whose own state is then left out.

    Raises:
        ValueError: Keys are missing or left over; the message shows which.
    """
    plain = {_bare(key): value for key, value in state.items()}
    earlier = {f"{k[:-4]}eval_base": v for k, v in plain.items() if k.endswith(".thresholds.base")}
    plain = earlier | plain  # there was one base once
    own = task.state_dict()
    # Metrics and the budget's state belong to the run that made them.
    run_state = ("evaluation.", "budget.")
    plain = {key: value for key, value in plain.items() if not key.startswith(run_state)}
    own = {key: value for key, value in own.items() if not key.startswith(run_state)}
    if other_attention:
        plain = {key: value for key, value in plain.items() if ".mechanism." not in key}
        own = {key: value for key, value in own.items() if ".mechanism." not in key}
    redrawn = [
        f"{name}.{buffer}"
        for name, module in task.named_modules()
        if isinstance(module, Mechanism)
        for buffer in module.redrawn
    ]
    plain |= {k: own[k] for k in redrawn if k in own.keys() & plain.keys() and own[k].shape != plain[k].shape}
    missing, extra = sorted(own.keys() - plain.keys()), sorted(plain.keys() - own.keys())
    shapes = [k for k in own.keys() & plain.keys() if own[k].shape != plain[k].shape]
    if missing or extra or shapes:
        raise ValueError(
            "the checkpoint does not fit this network: "
            + "; ".join(
                f"{what} {', '.join(keys[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}"
                for what, keys in (("missing", missing), ("left over", extra), ("of another shape", shapes))
                if keys
            )
        )
    task.load_state_dict({key: _spread_like(own[key], value) for key, value in plain.items()}, strict=False)


def _bare(name: str) -> str:
    return PREFIXES.sub(r"\1", name)


def _spread_like(own: Tensor, value: Tensor) -> Tensor:
    """Return the part of a stored tensor that this process holds, where the network is sharded."""
    if isinstance(own, DTensor):
        return distribute_tensor(value, own.device_mesh, own.placements)
    return value
