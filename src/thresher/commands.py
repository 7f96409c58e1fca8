"""The command line around `cli.py`: overrides are checked and errors told before anything heavy is imported."""

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from thresher import overrides
from thresher.interruption import Interrupted
from thresher.secrets import SECRET, without_secrets


def checked(conf: Path, name: str, arguments: Sequence[str]) -> None:
    """Exit with one message if an override of the primary config `name` cannot be meant."""
    flags = {"--multirun", "-m", "--hydra-help", "--help", "-h", "--version", "--resolve"}
    given = [a for a in arguments if a not in flags]
    if not any(a.startswith("-") for a in given):
        told(lambda: overrides.check(conf, name, given))
        told(lambda: refuse_secrets(given))
        if {"--multirun", "-m"} & set(arguments):
            told(lambda: check_multirun(conf, name, given))


def refuse_secrets(given: Sequence[str]) -> None:
    """Refuse a secret among overrides: Hydra's multirun.yaml and the metadata of wandb keep them as they were typed.

    Raises:
        ValueError: One of them looks like one.
    """
    for override in overrides.parse(given):
        key, text = override.key_or_group, str(override.input_line).partition("=")[2]
        named = SECRET.search(key.rpartition(".")[2]) and text not in ("", "null") and "${" not in text
        if named or without_secrets(text) != text:
            raise ValueError(
                f"{key} looks like a secret, and a command line is kept in histories, multirun.yaml and wandb's "
                "metadata. Set it in the environment: WANDB_API_KEY, HF_TOKEN, or key='${oc.env:NAME}'"
            )


def check_multirun(conf: Path, name: str, given: Sequence[str]) -> None:
    """Refuse Hydra's multirun where each training starts further processes: each of those would run all jobs again.

    Raises:
        ValueError: A trainer that is asked for starts processes of this command.
    """
    parsed = [o for o in overrides.parse(given) if o.key_or_group.split(".")[0].split("/")[0] != "hydra"]
    fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    swept = [
        [f"{o.key_or_group}={choice}" for choice in overrides.choices_of(conf, o)]
        for o in parsed
        if o.is_sweep_override() and o.key_or_group.partition(".")[0] in ("trainer", "experiment", "debug")
    ]
    for chosen in itertools.product(*swept):
        trainer = overrides.compose_config(conf, name, [*fixed, *chosen]).trainer
        strategy = str(trainer.strategy)
        in_process = trainer.devices in (1, "1") or any(word in strategy for word in ("spawn", "fork", "notebook"))
        if not in_process:
            raise ValueError(
                f"-m: strategy {strategy.splitlines()[0]!r} on devices={trainer.devices} starts more processes of this "
                "command, and each would run the whole sweep. Use python -m thresher.sweep, which gives each trial a "
                "process of its own, or trainer.devices=1"
            )


def train(cfg: DictConfig) -> float | None:
    """Train as `cfg` says; return the metric that a sweep optimises."""

    def run() -> float | None:
        if not isinstance(cfg.seed, int) or not 0 <= cfg.seed < 2**32:
            raise ValueError(f"seed must be a whole number, 0 .. {2**32 - 1}; got {cfg.seed!r}")
        from thresher import cli

        metrics = cli.train(cfg)
        wanted = cfg.optimized_metric
        if wanted is None or (wanted not in metrics and not in_sweep()):
            return None
        if wanted not in metrics:
            raise ValueError(f"optimized_metric={wanted} was not measured; there are: {', '.join(metrics)}")
        return metrics[wanted]

    return told(run)


def evaluate(arguments: Sequence[str], conf: Path) -> None:
    """Evaluate a checkpoint as the overrides say, or drop mechanisms in where an experiment asks for that."""

    def run() -> None:
        if any(o.key_or_group == "experiment" for o in overrides.parse(arguments)):
            from thresher import dropin

            dropin.evaluate(arguments, conf)
        else:
            from thresher import cli

            cli.evaluate(arguments, conf)

    told(run)


def told(run: Callable[[], Any]) -> Any:
    """Run; turn an error that the user can mend into one message and exit code 1, a signal into 128 and its number."""
    try:
        return run()
    except Interrupted as interruption:
        print(f"{interruption}; the same command goes on", file=sys.stderr)
        sys.exit(interruption.code)
    except Exception as error:
        # Lightning's own exception is known by name, so that a typo is answered without importing Lightning.
        mendable = isinstance(error, (ValueError, OSError, OmegaConfBaseException, InstantiationException))
        mendable = mendable or type(error).__name__ == "MisconfigurationException"
        if not mendable or os.environ.get("HYDRA_FULL_ERROR") or in_sweep():
            raise
        print(f"error: {reason(error)}\n(HYDRA_FULL_ERROR=1 shows the traceback)", file=sys.stderr)
        sys.exit(1)


def in_sweep() -> bool:
    """Say whether this is one of several jobs: an exit would end those that follow."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def reason(error: BaseException) -> str:
    """Return what was wrong, without the layers through which it was reported."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return str(error) or repr(error)
