"""The command: compose and check the config, build a driver and run it."""

import hashlib
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from thresher.config import overrides
from thresher.config.commands import compose_options
from thresher.tools.sweep.driver import Driver, Settings
from thresher.tools.sweep.launchers import Launcher, Local, Ray, Submitit
from thresher.tools.sweep.ledger import Ledger, Plan
from thresher.tools.sweep.pruning import Pruning
from thresher.tools.sweep.samplers import check_sampler
from thresher.tools.sweep.space import Spaces, read_spaces
from thresher.tools.sweep.status import StatusLine, describe_status, find_stale, print_tables
from thresher.tools.sweep.storage import hide_password, open_storage

LAUNCHERS = ("local", "submitit", "ray", "print")
MODES = ("run", "status")
PLAN_KEYS = (
    "program",
    "overrides",
    "spaces",
    "maximize",
    "minimize",
    "sampler",
    "trials",
    "seed",
)  # restored from sweep.yaml
TRIAL_OVERRIDES = "after_dashes"  # key of sweep.yaml: what followed --


def sweep(root: Path, arguments: Sequence[str], last: Sequence[str]) -> int:
    """Run the sweep of a command line; return its exit code.

    Args:
        root: Folder of `conf/` and the program.
        arguments: Overrides of `conf/sweep.yaml`.
        last: Overrides of the program, which followed `--`.

    Raises:
        ValueError: An option or override is wrong; the message says what to change.
    """
    conf = root / "conf"
    cfg = compose_options(conf, "sweep", arguments)
    if OmegaConf.is_missing(cfg, "name"):
        raise ValueError("which sweep? name=NAME begins or resumes one, sweep=NAME runs one of conf/sweep/")
    if cfg.mode == "status":
        last = last if last else _restore_plan(cfg, arguments)
    plan = _build_plan(cfg, read_spaces(cfg.overrides, cfg.spaces, last))
    program = root / cfg.program
    if not program.is_file():
        raise FileNotFoundError(f"there is no program {program}")
    # The keys of eval.py are those of the checkpoint that it reads.
    if program.stem != "eval" and (conf / f"{program.stem}.yaml").is_file():
        for space in plan.spaces.members:
            overrides.check(conf, program.stem, [*space.fixed, *(p.text for p in space.varied)])
    folder = Path(cfg.run.dir)
    command = [sys.executable, os.path.relpath(program)]
    if cfg.launcher == "print":
        return _print_commands(plan, command, folder)
    return _run(cfg, plan, command, folder, last)


def _restore_plan(cfg: DictConfig, arguments: Sequence[str]) -> list[str]:
    """Restore the options that a sweep began with, except those given again; return what followed `--`."""
    path = Path(cfg.run.dir) / "sweep.yaml"
    if not path.is_file():
        return []
    begun: Any = OmegaConf.load(path)
    given = {override.key_or_group.partition(".")[0] for override in overrides.parse(arguments)}
    for key in PLAN_KEYS:
        if key in begun and key not in given:
            cfg[key] = begun[key]
    return [str(each) for each in begun.get(TRIAL_OVERRIDES, [])]


def _build_plan(cfg: DictConfig, spaces: Spaces) -> Plan:
    check_sampler(cfg.sampler)
    for key, known in (("launcher", LAUNCHERS), ("mode", MODES)):
        if cfg[key] not in known:
            raise ValueError(f"there is no {key}={cfg[key]}. Available: {', '.join(known)}")
    objectives = dict.fromkeys(cfg.maximize, "maximize") | dict.fromkeys(cfg.minimize, "minimize")
    if not objectives or len(objectives) < len(cfg.maximize) + len(cfg.minimize):
        raise ValueError(f"maximize={cfg.maximize} and minimize={cfg.minimize} must name metrics, each once")
    if cfg.prune.start is not None and len(cfg.prune.monitor) != len(objectives):
        raise ValueError(f"prune.monitor needs one column for each of {', '.join(objectives)}")
    if cfg.sampler == "grid" and cfg.trials is not None:
        raise ValueError("trials= is for samplers that propose points; sampler=grid tries every point")
    if cfg.sampler != "grid" and (cfg.trials is None or cfg.trials < 1):
        raise ValueError(f"sampler={cfg.sampler} needs trials=N, at least 1")
    if cfg.sampler in ("nsga2", "gp") and len(spaces.members) > 1:
        raise ValueError(f"sampler={cfg.sampler} searches one space, not several: use tpe, random or grid")
    if cfg.sampler != "grid" and not any(space.varied for space in spaces.members) and len(spaces.members) == 1:
        raise ValueError("nothing varies: list values (seed=0,1,2) or give an interval")
    if cfg.workers < 1:
        raise ValueError(f"workers={cfg.workers} must be at least 1")
    return Plan(spaces, objectives, cfg.sampler, cfg.trials, cfg.seed, cfg.requeue)


def _run(cfg: DictConfig, plan: Plan, command: Sequence[str], folder: Path, last: Sequence[str]) -> int:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    url = cfg.storage or f"sqlite:///{(folder / 'study.db').resolve()}"
    if cfg.mode == "status" and cfg.storage is None and not (folder / "study.db").exists():
        raise FileNotFoundError(f"there is no sweep in {folder}")
    ledger = Ledger(open_storage(url), cfg.name, plan, cfg.workers)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if cfg.mode == "status":
        view = ledger.view()
        print(describe_status(view, 0, cfg.stale_after, 0))
        if stale := len(find_stale(view, cfg.stale_after)):
            print(f"stale: the driver of {stale} trials has gone; the sweep's command adopts or repeats them")
        if view.outside:
            print(
                f"{view.outside} trials of this study are not in this plan: repeat after -- what the sweep began with"
            )
        print_tables(view, plan.objectives, folder, console)
        return 0
    _save_options(cfg, folder, last)
    print(f"{cfg.name}: {len(ledger.slots)} trials by {cfg.sampler}, {cfg.workers} at a time  →  {folder}", flush=True)
    if cfg.retry_failed:
        print(f"{ledger.retry_failed()} failed trials run again", flush=True)
    if outside := ledger.view().outside:
        print(f"{outside} trials of this study are not in the present plan; they stay as they are", flush=True)
    pruning = None
    if cfg.prune.start is not None:
        maximize = tuple(direction == "maximize" for direction in plan.objectives.values())
        pruning = Pruning(tuple(cfg.prune.monitor), maximize, cfg.prune.start, cfg.prune.quorum)
    status = StatusLine(cfg.stale_after, cfg.workers)
    driver = Driver(ledger, _build_launcher(cfg, folder), _build_settings(cfg, command, folder), pruning, status)
    code = driver.run()
    status.close()
    view = ledger.view()
    print_tables(view, plan.objectives, folder, console)
    if code == 1:
        print(
            f"error: more than max_failures={cfg.max_failures} trials failed. retry_failed=true runs them again, "
            "max_failures=null continues without them",
            file=sys.stderr,
        )
    elif code > 1:
        print(
            f"interrupted: {describe_status(view, 0, cfg.stale_after, cfg.workers)}. Rerun the same command to resume",
            file=sys.stderr,
        )
    return code


def _build_settings(cfg: DictConfig, command: Sequence[str], folder: Path) -> Settings:
    return Settings(
        command,
        folder,
        workers=cfg.workers,
        timeout=cfg.timeout,
        max_failures=cfg.max_failures,
        heartbeat=cfg.heartbeat,
        stale_after=cfg.stale_after,
    )


def _build_launcher(cfg: DictConfig, folder: Path) -> Launcher:
    if cfg.launcher == "submitit":
        parameters: Any = OmegaConf.to_container(cfg.slurm, resolve=True)
        return Submitit(folder / "slurm", cfg.cluster, parameters)
    if cfg.launcher == "ray":
        options: Any = OmegaConf.to_container(cfg.ray, resolve=True)
        return Ray(options.pop("address"), options)
    return Local(cfg.threads or max(1, (os.cpu_count() or 1) // cfg.workers))


def _save_options(cfg: DictConfig, folder: Path, last: Sequence[str]) -> None:
    """Write the options of the sweep, without the password of the storage."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    plain.pop("help")
    plain[TRIAL_OVERRIDES] = list(last)
    if plain["storage"]:
        plain["storage"] = hide_password(plain["storage"])
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(plain), folder / "sweep.yaml")


def _print_commands(plan: Plan, command: Sequence[str], folder: Path) -> int:
    """Print a command for each point of the grid without a result."""
    if plan.sampler != "grid":
        raise ValueError(f"launcher=print needs sampler=grid: {plan.sampler} needs results to propose points")
    for point in plan.spaces.grid():
        place = folder / hashlib.blake2b(" ".join(point).encode(), digest_size=4).hexdigest()
        if not _has_result(place, list(plan.objectives)):
            print(shlex.join([*command, *point, f"run.dir={overrides.quote(str(place))}"]))
    return 0


def _has_result(folder: Path, objectives: Sequence[str]) -> bool:
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError):
        return False
    return set(objectives) <= metrics.keys()
