"""The command line: check overrides and report errors before anything heavy is imported."""

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

from thresher.checkpoints import files
from thresher.cli.ending import record_failure
from thresher.config import overrides
from thresher.config.evaluation import read_request
from thresher.config.overrides import Override
from thresher.config.redact import SECRET, remove_secrets
from thresher.console import accept_any_text
from thresher.signals import Interrupted

FULL = "HYDRA_FULL_ERROR"
TRACEBACK = bool(os.environ.get(FULL))  # whether the user asks for it
MULTIRUN = {"--multirun", "-m"}
FLAGS = MULTIRUN | {"--hydra-help", "--help", "-h", "--version", "--resolve"}


# Training


def check_arguments(conf: Path, name: str, arguments: Sequence[str]) -> None:
    """Check the overrides of the primary config `name`; exit with one message if one is wrong."""
    given = [a for a in arguments if a not in FLAGS]
    if any(a.startswith("-") for a in given):
        return

    def check() -> None:
        parsed = overrides.parse(given)
        overrides.check_overrides(conf, name, parsed)
        check_secrets(parsed)
        if MULTIRUN & set(arguments):
            check_multirun(conf, name, parsed)
        elif swept := [str(o.input_line) for o in parsed if o.is_sweep_override()]:
            check_single(swept, parsed)

    report_errors(check)


def check_secrets(parsed: Sequence[Override]) -> None:
    """Refuse a secret among overrides, since Hydra's multirun.yaml and the metadata of wandb store them.

    Raises:
        ValueError: An override looks like a secret.
    """
    for override in parsed:
        key, text = override.key_or_group, str(override.input_line).partition("=")[2]
        has_secret_name = SECRET.search(key.rpartition(".")[2]) and text not in ("", "null") and "${" not in text
        if has_secret_name or remove_secrets(text) != text:
            raise ValueError(
                f"{key} looks like a secret, and a command line is kept in histories, multirun.yaml and wandb's "
                "metadata. Set it in the environment: WANDB_API_KEY, HF_TOKEN, or key='${oc.env:NAME}'"
            )


def check_multirun(conf: Path, name: str, parsed: Sequence[Override]) -> None:
    """Refuse Hydra's multirun if a training starts further processes, each of which would run all jobs again.

    Raises:
        ValueError: A trainer among the jobs starts processes of this command.
    """
    parsed = [o for o in parsed if o.key_or_group.split(".")[0].split("/")[0] != "hydra"]
    fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    swept = [
        [f"{o.key_or_group}={choice}" for choice in overrides.list_chosen(conf, o)]
        for o in parsed
        if o.is_sweep_override() and o.key_or_group.partition(".")[0] in ("trainer", "experiment", "debug")
    ]
    for choices in itertools.product(*swept):
        trainer = overrides.compose_config(conf, name, [*fixed, *choices]).trainer
        strategy = str(trainer.strategy)
        in_process = trainer.devices in (1, "1") or any(word in strategy for word in ("spawn", "fork", "notebook"))
        if not in_process:
            raise ValueError(
                f"-m: strategy {strategy.splitlines()[0]!r} on devices={trainer.devices} starts more processes of this "
                "command, and each would run the whole sweep. Use python -m thresher.sweep, which gives each trial a "
                "process of its own, or trainer.devices=1"
            )


def check_single(swept: Sequence[str], parsed: Sequence[Override]) -> None:
    """Refuse several values for a key without -m.

    Raises:
        ValueError: Hydra's own settings do not ask for a multirun either.
    """
    if not any(o.key_or_group == "hydra.mode" for o in parsed):
        key, _, values = swept[0].partition("=")
        raise ValueError(
            f"{swept[0]} names several values, and this command trains one: python train.py -m {' '.join(swept)} "
            f"trains with each. A list is '{key}=[{values}]', a text with a comma \"{key}='{values}'\""
        )


def run_hydra(main: Callable[[], Any]) -> None:
    """Run a function that `@hydra.main` decorates; an error before it starts is one message, too."""
    if not TRACEBACK:
        os.environ[FULL] = "1"  # Hydra then raises what it would print with all its layers
    if MULTIRUN & set(sys.argv) and not any(a.lstrip("+").startswith("run.dir=") for a in sys.argv):
        # Names of runs contain the choices of a job, which are not known yet.
        sys.argv.append(f"run.dir=runs/multirun/{datetime.now():%Y-%m-%d_%H-%M-%S}")
    report_errors(main)


def train(cfg: DictConfig, conf: Path) -> float | None:
    """Train as a config says; return the metric that a sweep optimises."""
    if not TRACEBACK:
        os.environ.pop(FULL, None)

    def run() -> float | None:
        check_config(cfg)
        from thresher.run.early import check_settings

        check_settings(cfg)
        from thresher.run import train as training

        hydra = HydraConfig.get()
        # Hydra knows the folder of each job of a sweep, and Lightning tells it to the processes that it starts.
        folder = os.path.relpath(hydra.runtime.output_dir)
        metrics = training.train(cfg, conf, folder, list(hydra.overrides.task))
        name = cfg.optimized_metric
        if name is None or (name not in metrics and not is_sweep_job()):
            return None
        if name not in metrics:
            raise ValueError(f"optimized_metric={name} was not measured; there are: {', '.join(metrics)}")
        return metrics[name]

    chosen = str(cfg.run.dir).strip()
    folder = Path(HydraConfig.get().runtime.output_dir) if chosen else None
    resumed = None if folder is None else f"run.dir={os.path.relpath(folder)}"
    result: float | None = report_errors(lambda: record_failure(run, folder, find_reason), resumed)
    return result


def check_config(cfg: DictConfig) -> None:
    """Check the config of a training as far as possible before heavy imports.

    Raises:
        ValueError: A value is wrong.
        FileNotFoundError: A checkpoint is missing.
    """
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ValueError(f"{missing[0]} has no value of its own: give one by {missing[0]}=...")
    if not str(cfg.run.dir).strip():
        raise ValueError("run.dir is empty; leave it out for a new folder in runs/, or name one")
    if not isinstance(cfg.seed, int) or not 0 <= cfg.seed < 2**32:
        raise ValueError(f"seed must be a whole number, 0 .. {2**32 - 1}; got {cfg.seed!r}")
    for key in ("init_from", "ckpt_path"):
        if cfg[key] is not None and not str(cfg[key]).strip():
            raise ValueError(
                f"{key} is empty: name a checkpoint, {key}=runs/.../checkpoints/best.ckpt, or leave it out"
            )
        if cfg[key] is not None and not Path(str(cfg[key])).exists():
            raise FileNotFoundError(f"{key}={cfg[key]}: {files.build_not_found_error(Path(str(cfg[key])))}")
    if cfg.resume not in ("auto", "never") and not Path(str(cfg.resume)).exists():
        raise FileNotFoundError(
            f"resume={cfg.resume} is neither auto nor never, and {files.build_not_found_error(Path(str(cfg.resume)))}"
        )


# Evaluation


def evaluate(arguments: Sequence[str], conf: Path) -> None:
    """Evaluate a checkpoint, or drop mechanisms in where an experiment asks for that."""

    def run() -> None:
        request = read_request(arguments, conf)
        if request.experiment is not None:
            from thresher.run import dropin

            dropin.evaluate(request)
            return
        if not request.checkpoint.exists():
            raise files.build_not_found_error(request.checkpoint)
        from thresher.run import evaluate as evaluation

        evaluation.evaluate(request)

    report_errors(run)


# Errors


def report_errors(run: Callable[[], Any], resumed: str | None = None) -> Any:
    """Run a function; report an error that the user can correct in one message, and exit with code 1.

    Args:
        run: The function.
        resumed: The option with which the same command continues after a signal, if it needs one.

    After a signal the exit code is 128 and its number. Other errors pass, and so does that of an output which nobody
    reads (see `console.end_command`).
    """
    accept_any_text()
    try:
        return run()
    except Interrupted as interruption:
        option = "" if resumed is None else f" with {resumed}"
        print(f"{interruption}; the same command{option} resumes", file=sys.stderr)
        sys.exit(interruption.code)
    except BrokenPipeError:
        raise
    except Exception as error:
        # Lightning's own exception is known by name, so that a typo is answered without importing Lightning.
        mendable = isinstance(error, (ValueError, OSError, OmegaConfBaseException, HydraException))
        mendable = mendable or type(error).__name__ == "MisconfigurationException"
        if not mendable or TRACEBACK or is_sweep_job():
            raise
        print(f"error: {find_reason(error)}\n(HYDRA_FULL_ERROR=1 shows the traceback)", file=sys.stderr)
        sys.exit(1)


def is_sweep_job() -> bool:
    """Tell whether this is one of several jobs, where an exit would end the later ones."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def find_reason(error: BaseException) -> str:
    """Find the message of an error, without those of the errors that wrap it."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OmegaConfBaseException):
        first, key = (str(error).splitlines() or [repr(error)])[0], error.full_key
        return first if key is None or key in first else f"{key}: {first}"
    text, name = str(error), f"\n{type(error).__name__}: "
    if text.startswith("Caught ") and name in text:  # in a process that loads data, whose traceback PyTorch quotes
        text = text.rpartition(name)[2].rstrip()
    return text or repr(error)
