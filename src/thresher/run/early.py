"""Check settings by building what needs neither data nor network, before Lightning takes its seconds to import."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from thresher.attention.contract import Pattern
from thresher.attention.mechanism import Mechanism

HEADS, HEAD_DIM = 4, 1024  # wide enough for every option; the sizes of the network are checked when it is built


def check_settings(cfg: DictConfig) -> None:
    """Build the mechanisms, the budget, the optimiser and the schedule of a config, and drop them.

    Parts of other packages are left alone: they may need the sizes of the real network.

    Raises:
        ValueError: A mechanism, the optimiser or the schedule refuses a value; the message names it.
        InstantiationException: The budget refuses one, which is the cause.
    """
    check_accelerator(str(cfg.trainer.accelerator))
    for node in filter(_is_own, _list_mechanisms(cfg)):
        make = instantiate(node, _convert_="all")
        kind = make.func
        if isinstance(kind, type) and issubclass(kind, Mechanism):
            _call("attention", make, HEADS, HEAD_DIM, min(kind.supports, key=list(Pattern).index))
    instantiate(cfg.compute, _convert_="all")
    if _is_own(cfg.optimizer) and _is_own(cfg.scheduler):
        optimizer = _call("optimizer", instantiate(cfg.optimizer, _convert_="all"), nn.Linear(1, 1))
        _call("scheduler", instantiate(cfg.scheduler, _convert_="all"), optimizer, total_steps=1)


def check_accelerator(name: str) -> None:
    """Check that this machine has what a trainer is to run on.

    Raises:
        ValueError: It has no GPU.
    """
    found = torch.cuda.is_available() or (name == "gpu" and torch.backends.mps.is_available())
    if name in ("gpu", "cuda") and not found:
        raise ValueError(
            f"trainer.accelerator={name}: torch finds no GPU on this machine. trainer=cpu runs on the processor; "
            "python -m thresher.doctor require=cuda says what a GPU lacks"
        )


def _call(part: str, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Build a part; an option that it lacks is a wrong value, too."""
    try:
        return make(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"{part}: {error}") from error


def _list_mechanisms(cfg: DictConfig) -> Iterator[Any]:
    """Yield the nodes of the mechanisms: that of the network, and those of its places."""
    yield cfg.attention
    yield from (node for node in cfg.model.values() if isinstance(node, DictConfig) and "_partial_" in node)


def _is_own(node: DictConfig) -> bool:
    return str(node.get("_target_")).startswith("thresher.")
