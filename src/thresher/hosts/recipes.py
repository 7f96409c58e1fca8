"""How a mechanism was made, in words that a configuration file can hold."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from thresher import attention as mechanisms
from thresher.attention.base import MakeMechanism, Mechanism, Pattern
from thresher.attention.thresholds import Thresholds
from thresher.hosts.recording import Seen


def recipe_of(make: MakeMechanism, seen: Seen) -> dict[str, Any]:
    """Say how a mechanism was made. One of nobody's knowledge is noted too, so that its absence is not overlooked."""
    cls, settings = (make.func, make.keywords) if isinstance(make, partial) else (make, {})
    name = getattr(cls, "__module__", "").rpartition(".")[2]
    if not (isinstance(cls, type) and issubclass(cls, Mechanism) and name in mechanisms.available()):
        name = repr(make)
    place = {"num_heads": seen.num_heads, "head_dim": seen.head_dim, "pattern": seen.pattern.name}
    return {"attention": name, "hyperparameters": dict(settings), **place}


def make_of(recipe: dict[str, Any]) -> MakeMechanism:
    """Return what makes the mechanism of a recipe.

    Raises:
        ValueError: It is none of thresher's, and a file is not to name code that runs.
    """
    return partial(mechanisms.find(recipe["attention"]), **recipe["hyperparameters"])


def seen_of(recipe: dict[str, Any]) -> Seen:
    """Return where it stood."""
    return Seen(recipe["num_heads"], recipe["head_dim"], Pattern[recipe["pattern"]])


@torch.no_grad()
def complete(model: nn.Module, missing: Iterable[str]) -> list[str]:
    """Fill in what files of earlier versions do not hold; return what mechanisms lack still."""
    lacking = []
    for key in sorted(key for key in missing if ".mechanism." in key):
        owner, _, name = key.rpartition(".")
        thresholds = model.get_submodule(owner)
        if name == "eval_base" and isinstance(thresholds, Thresholds):  # there was one base once
            thresholds.eval_base.copy_(thresholds.base)
        else:
            lacking.append(key)
    return lacking
