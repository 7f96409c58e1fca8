"""Put stored weights into a network: those of its own checkpoint, or those that a training starts from."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from thresher.attention.mechanism import Mechanism
from thresher.attention.registry import name_of
from thresher.attention.shared.thresholds import IN_SPREADS
from thresher.checkpoints.exports import read_export
from thresher.checkpoints.format import CONFIG, NAME, NETWORK, RECORD, STATE, is_export
from thresher.checkpoints.load import check_checkpoint, read_any_weights
from thresher.checkpoints.validate import check_state

WRAPPERS = re.compile(r"(^|\.)(_orig_mod\.|module\.)+")  # prefixes of torch.compile and DDP
RUN_STATE = ("evaluation.", "budget.")  # metrics and the state of the budget belong to the run that wrote them
HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # where other libraries' checkpoints keep weights


def load_initial_weights(task: nn.Module, path: str | Path, classes: int | None, mechanisms: bool = False) -> list[str]:
    """Load the weights that a training starts from.

    Args:
        task: The task to load into.
        path: A checkpoint or an export of this project; or a file of the network's weights alone, under the names that
            its library gives them, such as timm writes: .safetensors, or what torch.save made of a state dict, by
            itself or in an entry of that name.
        classes: Number of logits of a classifier.
        mechanisms: Whether to load the state of mechanisms, too, such as thresholds and tail factors; the width of
            surrogates stays that of the task.

    Returns:
        The weights of a file of weights alone that were for another number of classes and were left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, holds more than weights, or does not fit the network; or its mechanisms are none, or
            others than those of the task.
    """
    path = Path(path)
    stored = read_export(path) if is_export(path) else read_any_weights(path)
    if isinstance(stored, dict) and RECORD in stored:
        checkpoint = check_checkpoint(stored, path)
        state = _choose_widths(task, checkpoint, path) if mechanisms else checkpoint[STATE]
        load_weights(task, state, other_attention=not mechanisms)
        return []
    if mechanisms:
        raise ValueError(f"init_mechanisms=true: {path} is a file of weights alone; name a checkpoint or an export")
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
    stored = _complete(task, own, select({_unwrap_name(key): value for key, value in state.items()}))
    if problems := _describe_problems(own, stored):
        raise ValueError(f"the checkpoint does not fit this network: {problems}")
    task.load_state_dict({key: _shard_like(own[key], value) for key, value in stored.items()}, strict=False)


def _complete(task: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Complete a state by the hashes of a task that have another shape in it."""
    redrawn = [
        f"{name}.{buffer}"
        for name, module in task.named_modules()
        if isinstance(module, Mechanism)
        for buffer in module.redrawn
    ]
    drawn = {k: own[k] for k in redrawn if k in own.keys() & state.keys() and own[k].shape != state[k].shape}
    return {**state, **drawn}


def _describe_problems(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str:
    """Describe how the names and shapes of a stored state differ; empty if they do not."""
    problems = {
        "missing": sorted(own.keys() - stored.keys()),
        "left over": sorted(stored.keys() - own.keys()),
        "of another shape": [k for k in own.keys() & stored.keys() if own[k].shape != stored[k].shape],
    }
    return "; ".join(
        f"{problem} {', '.join(keys[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}"
        for problem, keys in problems.items()
        if keys
    )


def _choose_widths(task: nn.Module, checkpoint: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the state of a checkpoint with the widths of surrogates of a task, whose mechanisms it must have.

    Raises:
        ValueError: It has none, or others.
    """
    whole = {_unwrap_name(name): value for name, value in checkpoint[STATE].items()}
    own = {name: value for name, value in task.state_dict().items() if ".mechanism." in name}
    stored = _complete(task, own, {name: value for name, value in whole.items() if ".mechanism." in name})
    name = checkpoint[RECORD][CONFIG].get("attention", {}).get(NAME)
    if not stored:
        raise ValueError(
            f"init_mechanisms=true: attention={name} of {path} has no thresholds, tail factors or other state; name a "
            "checkpoint that has, such as a tuning's, or leave init_mechanisms out"
        )
    if problems := _describe_problems(own, stored):
        kinds = sorted({name_of(type(module)) for module in task.modules() if isinstance(module, Mechanism)})
        raise ValueError(
            f"init_mechanisms=true: mechanisms of {path} (attention={name}) are not those of this run "
            f"(attention={', '.join(kinds)}): {problems}. Set attention, its tail and the number of heads as they were"
        )
    for key in (key for key in own if key.endswith(IN_SPREADS) and bool(own[key]) != bool(stored[key])):
        there, here = ("spread" if bool(state[key]) else "nats" for state in (stored, own))
        raise ValueError(
            f"init_mechanisms=true: thresholds of {path} count in {there}, and this run's in {here}: set "
            f"attention.unit={there}"
        )
    return whole | {name: value for name, value in own.items() if name.endswith(".thresholds.tau")}


def _unwrap_name(name: str) -> str:
    return WRAPPERS.sub(r"\1", name)


def _shard_like(own: Tensor, value: Tensor) -> Tensor:
    """Shard a stored tensor as the parameter is, if the network is sharded."""
    if isinstance(own, DTensor):
        return distribute_tensor(value, own.device_mesh, own.placements)
    return value
