"""The command line around `cli.py`: overrides are checked and errors told before anything heavy is imported."""

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from thresher import files, overrides
from thresher.interruption import Interrupted
from thresher.secrets import SECRET, without_secrets

FULL = "HYDRA_FULL_ERROR"
TRACEBACK = bool(os.environ.get(FULL))  # whether a person asks for it


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


def start(main: Callable[[], Any]) -> None:
    """Run what `@hydra.main` made of a function: what it fails at before the function runs is one message, too."""
    if not TRACEBACK:
        os.environ[FULL] = "1"  # Hydra then raises what it would print with all its layers
    if {"--multirun", "-m"} & set(sys.argv) and not any(a.lstrip("+").startswith("run.dir=") for a in sys.argv):
        # Names of runs have the choices of a job in them, which are not known before there is one.
        sys.argv.append(f"run.dir=runs/multirun/{datetime.now():%Y-%m-%d_%H-%M-%S}")
    told(main)


def train(cfg: DictConfig) -> float | None:
    """Train as `cfg` says; return the metric that a sweep optimises."""

    if not TRACEBACK:
        os.environ.pop(FULL, None)

    def run() -> float | None:
        check_run(cfg)
        from thresher import cli

        metrics = cli.train(cfg)
        wanted = cfg.optimized_metric
        if wanted is None or (wanted not in metrics and not in_sweep()):
            return None
        if wanted not in metrics:
            raise ValueError(f"optimized_metric={wanted} was not measured; there are: {', '.join(metrics)}")
        return metrics[wanted]

    return told(run)


def check_run(cfg: DictConfig) -> None:
    """Check what a training is asked that can be told before anything heavy is imported.

    Raises:
        ValueError: A value cannot be.
        FileNotFoundError: A checkpoint is not there.
    """
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ValueError(f"{missing[0]} has no value of its own: give one by {missing[0]}=...")
    if not str(cfg.run.dir).strip():
        raise ValueError("run.dir is empty; leave it out for a new folder in runs/, or name one")
    if not isinstance(cfg.seed, int) or not 0 <= cfg.seed < 2**32:
        raise ValueError(f"seed must be a whole number, 0 .. {2**32 - 1}; got {cfg.seed!r}")
    for key in ("init_from", "ckpt_path"):
        if cfg[key] is not None and not Path(str(cfg[key])).exists():
            raise files.no_checkpoint(Path(str(cfg[key])))
    if cfg.resume not in ("auto", "never") and not Path(str(cfg.resume)).exists():
        raise FileNotFoundError(
            f"resume={cfg.resume} is neither auto nor never, and {files.no_checkpoint(Path(str(cfg.resume)))}"
        )


def evaluate(arguments: Sequence[str], conf: Path) -> None:
    """Evaluate a checkpoint as the overrides say, or drop mechanisms in where an experiment asks for that."""

    def run() -> None:
        given = overrides.parse(arguments)
        for override in given:
            if overrides.is_group(conf, override.key_or_group) and not override.is_sweep_override():
                for choice in overrides.choices_of(conf, override):
                    overrides.check_choice(conf, override.key_or_group, choice)
        if any(o.key_or_group == "experiment" for o in given):
            from thresher import dropin

            dropin.evaluate(arguments, conf)
        else:
            path = overrides.checkpoint_in(given)
            if not path.exists():
                raise files.no_checkpoint(path)
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
        mendable = isinstance(error, (ValueError, OSError, OmegaConfBaseException, HydraException))
        mendable = mendable or type(error).__name__ == "MisconfigurationException"
        if not mendable or TRACEBACK or in_sweep():
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
    if isinstance(error, OmegaConfBaseException):
        first, key = (str(error).splitlines() or [repr(error)])[0], error.full_key
        return first if key is None or key in first else f"{key}: {first}"
    text, name = str(error), f"\n{type(error).__name__}: "
    if text.startswith("Caught ") and name in text:  # in a process that loads data, whose traceback PyTorch quotes
        text = text.rpartition(name)[2].rstrip()
    return text or repr(error)
