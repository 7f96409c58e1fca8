"""Put stored weights into a network: those of its own checkpoint, or those that a training starts from."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from thresher.attention.mechanism import Mechanism
from thresher.attention.shared.thresholds import fill_in_units
from thresher.checkpoints.exports import read_export
from thresher.checkpoints.format import NETWORK, RECORD, STATE, is_export
from thresher.checkpoints.load import check_checkpoint, read_any_weights
from thresher.checkpoints.validate import check_state

WRAPPERS = re.compile(r"(^|\.)(_orig_mod\.|module\.)+")  # prefixes of torch.compile and DDP
RUN_STATE = ("evaluation.", "budget.")  # metrics and the state of the budget belong to the run that wrote them
HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # where other libraries' checkpoints keep weights


def load_initial_weights(task: nn.Module, path: str | Path, classes: int | None) -> list[str]:
    """Load the weights that a training starts from.

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
    stored = read_export(path) if is_export(path) else read_any_weights(path)
    if isinstance(stored, dict) and RECORD in stored:
        load_weights(task, check_checkpoint(stored, path)[STATE], other_attention=True)
        return []
    holder = next((name for name in HOLDERS if isinstance(stored, dict) and name in stored), None)
    state = check_state(stored if holder is None else stored[holder], path)
    state = {NETWORK + _unwrap_name(name): value for name, value in state.items()}
    own = task.state_dict()
    left_out = [
        name
        for name, value in state.items()
        if name in own and value.shape != own[name].shape == (classes, *value.shape[1:])
    ]
    load_weights(task, state | {name: own[name] for name in left_out}, other_attention=True)
    return left_out


def load_weights(task: nn.Module, state: Mapping[str, Tensor], other_attention: bool) -> None:
    """Load a stored state into a task, without the prefixes of wrappers.

    Hashes that were drawn for other settings of a mechanism, such as another number of them, give way to its own.

    Args:
        task: The task to load into.
        state: The stored state; `_orig_mod.` (torch.compile) and `module.` (DDP) in its keys are understood.
        other_attention: Whether the stored run used another mechanism, whose own state is then left out.

    Raises:
        ValueError: Keys are missing or left over; the message shows which.
    """

    def select(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            key: value
            for key, value in tensors.items()
            if not key.startswith(RUN_STATE) and not (other_attention and ".mechanism." in key)
        }

    own = select(task.state_dict())
    stored = select({_unwrap_name(key): value for key, value in state.items()})
    redrawn = [
        f"{name}.{buffer}"
        for name, module in task.named_modules()
        if isinstance(module, Mechanism)
        for buffer in module.redrawn
    ]
    stored |= {k: own[k] for k in redrawn if k in own.keys() & stored.keys() and own[k].shape != stored[k].shape}
    stored |= fill_in_units(own, stored)
    problems = {
        "missing": sorted(own.keys() - stored.keys()),
        "left over": sorted(stored.keys() - own.keys()),
        "of another shape": [k for k in own.keys() & stored.keys() if own[k].shape != stored[k].shape],
    }
    if any(problems.values()):
        raise ValueError(
            "the checkpoint does not fit this network: "
            + "; ".join(
                f"{problem} {', '.join(keys[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}"
                for problem, keys in problems.items()
                if keys
            )
        )
    task.load_state_dict({key: _shard_like(own[key], value) for key, value in stored.items()}, strict=False)


def _unwrap_name(name: str) -> str:
    return WRAPPERS.sub(r"\1", name)


def _shard_like(own: Tensor, value: Tensor) -> Tensor:
    """Shard a stored tensor as the parameter is, if the network is sharded."""
    if isinstance(own, DTensor):
        return distribute_tensor(value, own.device_mesh, own.placements)
    return value
