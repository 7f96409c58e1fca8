"""Auxiliary losses: what mechanisms want to be small besides the loss of the task.

A mechanism returns them in `Attended.losses` and states their names and weights in `auxiliary`; a `ComputeMeter`
averages each over layers, heads and examples. The task, a tuning and the Trainer of transformers add them, weighted.
"""

import difflib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from thresher.attention.mechanism import Metered
from thresher.attention.options import check_number


def collect_weights(modules: Iterable[Metered]) -> dict[str, float]:
    """Collect the names of the losses that modules may have, and the weights that they state.

    Raises:
        ValueError: Two modules state different weights for one name.
    """
    weights: dict[str, float] = {}
    for module in modules:
        for name, weight in module.auxiliary.items():
            if weights.setdefault(name, weight) != weight:
                raise ValueError(
                    f"{type(module).__name__} weighs its auxiliary loss {name} by {weight:g}, another module by "
                    f"{weights[name]:g}: a name has one weight"
                )
    return weights


def choose_weights(
    stated: Mapping[str, float], given: Mapping[str, float] | None, option: str = "auxiliary"
) -> dict[str, float]:
    """Replace the weights that modules state by those that are given.

    Args:
        stated: Names of the losses that there are, and their weights.
        given: Other weights for some of them; 0 leaves a loss out.
        option: Name of the option that gives them, for errors.

    Raises:
        ValueError: A name is unknown, or a weight is negative or no number.
    """
    weights = dict(stated)
    for name, weight in (given or {}).items():
        if name not in stated:
            close = difflib.get_close_matches(str(name), stated, n=1)
            hint = f"did you mean {option}.{close[0]}? " if close else ""
            known = ", ".join(stated) or "none: no mechanism of the network has one"
            raise ValueError(f"{option}.{name}: there is no such auxiliary loss; {hint}Available: {known}")
        check_number(f"{option}.{name}", weight, least=0.0)
        weights[name] = float(weight)
    return weights


def sum_losses(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor | float:
    """Sum losses by their weights; 0 if nothing weighs."""
    parts = [loss * weights[name] for name, loss in losses.items() if weights[name]]
    return torch.stack(parts).sum() if parts else 0.0
