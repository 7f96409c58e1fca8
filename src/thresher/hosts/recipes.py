"""Describe how a mechanism was made, as plain values for a configuration file."""

from collections.abc import Callable
from functools import partial
from typing import Any

from thresher import attention as mechanisms
from thresher.attention.contract import Pattern
from thresher.attention.mechanism import MakeMechanism, Mechanism, Metered
from thresher.attention.registry import complete_hyperparameters
from thresher.attention.shared.thresholds import Thresholds
from thresher.feedforward.topk_ffn import TopKFeedForward
from thresher.hosts.recording import Usage

FEED_FORWARD = {"topk_ffn": TopKFeedForward}


def build_recipe(make: Callable[..., Metered], mechanism: Metered) -> dict[str, Any]:
    """Build the recipe of a mechanism, with all hyper-parameters, so that a changed default does not change it.

    A mechanism from outside is recorded by its class, so that its absence is reported.
    """
    cls, settings = (make.func, make.keywords) if isinstance(make, partial) else (make, {})
    name = next((name for name, known in {**_find_mechanism(cls), **FEED_FORWARD}.items() if known is cls), None)
    place = {}
    if isinstance(mechanism, Mechanism):
        place = {"num_heads": mechanism.num_heads, "head_dim": mechanism.head_dim, "pattern": mechanism.pattern.name}
    if name is None:
        return {"attention": _format_class(mechanism), **place}
    return {"attention": name, "hyperparameters": complete_hyperparameters(cls, settings), **place}


def update_recipe(recipe: dict[str, Any], mechanism: Metered) -> dict[str, Any]:
    """Return a recipe with the unit that the thresholds of its mechanism have now, as a tuning may have chosen it."""
    thresholds, settings = getattr(mechanism, "thresholds", None), recipe.get("hyperparameters", {})
    if not isinstance(thresholds, Thresholds) or settings.get("unit", thresholds.unit) == thresholds.unit:
        return recipe
    gate = settings["gate"] | {"tau": round(float(thresholds.tau), 6)}  # is counted in that unit, too
    return {**recipe, "hyperparameters": {**settings, "unit": thresholds.unit, "gate": gate}}


def build_unknown_recipe(kind: str, mechanism: Metered) -> dict[str, Any]:
    """Build the recipe of a mechanism whose arguments are unknown: `mount` was called, not `inject`."""
    return {"host": kind, "attention": _format_class(mechanism)}


def _format_class(mechanism: Metered) -> str:
    return f"{type(mechanism).__module__}.{type(mechanism).__qualname__}"


def _find_mechanism(cls: Any) -> dict[str, type[Mechanism]]:
    name = mechanisms.name_of(cls) if isinstance(cls, type) else ""
    return {name: mechanisms.find(name)} if name in mechanisms.available() else {}


def restore_make(recipe: dict[str, Any]) -> MakeMechanism:
    """Restore the constructor of the mechanism of a recipe.

    Raises:
        ValueError: The mechanism is not a known one; a file must not name code to run.
    """
    return partial(mechanisms.find(recipe["attention"]), **recipe["hyperparameters"])


def read_usage(recipe: dict[str, Any]) -> Usage:
    """Read the usage that a recipe stores."""
    return Usage(recipe["num_heads"], recipe["head_dim"], Pattern[recipe["pattern"]])
