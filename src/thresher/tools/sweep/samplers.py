"""Samplers, which propose points: Optuna's, by name."""

import warnings
from importlib.util import find_spec

import optuna
from optuna.samplers import BaseSampler

SAMPLERS = ("grid", "random", "tpe", "nsga2", "gp")


def check_sampler(name: str) -> None:
    """Raise a ValueError unless there is such a sampler, and what it needs is installed."""
    if name not in SAMPLERS:
        raise ValueError(f"there is no sampler={name}. Available: {', '.join(SAMPLERS)}")
    if name == "gp" and find_spec("scipy") is None:
        raise ValueError("sampler=gp needs SciPy: pip install 'thresher[sweep]'")


def build_sampler(name: str, seed: int, workers: int) -> BaseSampler:
    """Build a sampler; the grid needs none, since its points are planned.

    Args:
        name: One of `SAMPLERS`.
        seed: Of its random numbers.
        workers: Trials that run at a time; with several, TPE avoids the points that are running.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=workers > 1)
        if name == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)
