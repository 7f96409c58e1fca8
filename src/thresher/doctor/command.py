"""From a command line to a report: what is on, what holds, and whether anything that was asked for fails."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from thresher import overrides
from thresher.attention import available, hyperparameters
from thresher.attention import find as find_mechanism
from thresher.attention.options import check_choice, check_integer
from thresher.doctor import backends, machine, show
from thresher.doctor.leaks import examined

BACKENDS = ("cpu", "cuda")


def doctor(conf: Path, arguments: Sequence[str]) -> int:
    """Report on this machine and on a model; return 1 where something that was asked for fails, else 0.

    Raises:
        ValueError: An option cannot be, or there is no such model.
        FileNotFoundError: There is no such file.
    """
    overrides.check(conf, "doctor", [a for a in arguments if not a.startswith("settings.")])
    cfg = overrides.compose_config(conf, "doctor", [_adding(a) for a in arguments])
    names, settings = check_options(cfg)
    alone = cfg.json == "-"
    report: dict[str, Any] = {"versions": machine.versions(), "machine": machine.machine()}
    if not alone:
        show.machine(report["versions"], report["machine"])
    report["backends"] = backends.backends()
    if not alone:
        show.backends(report["backends"])
    failed = [f"require=cpu: the kernel of {r['mechanism']} is off" for r in _off(report["backends"], cfg.require)]
    failed += [f"the kernel of {r['mechanism']}: {r['why']}" for r in report["backends"] if r["kernel"] == "wrong"]
    if "cuda" in _listed(cfg.require) and not torch.cuda.is_available():
        failed.append(f"require=cuda: {machine.why_no_cuda()}")
    if cfg.network is not None:
        report["network"] = str(cfg.network)
        report["masks"] = []
        for row in _masks(cfg, conf, names, settings):
            report["masks"].append(row)
            if not alone:
                show.progress(row)
        failed += [_said(row) for row in report["masks"] if row["failed"]]
        if not alone:
            show.masks(report["network"], report["masks"])
    report["failed"] = failed
    _write(report, cfg.json)
    if not alone:
        show.verdict(failed)
    return int(bool(failed))


def check_options(cfg: DictConfig) -> tuple[list[str] | None, dict[str, Any]]:
    """Return the mechanisms that were named, and the hyper-parameters.

    Raises:
        ValueError: There is no such choice.
    """
    for name in _listed(cfg.require):
        check_choice("require", name, BACKENDS)
    check_integer("tokens", cfg.tokens, 8)
    check_integer("seed", cfg.seed, 0)
    names = None if cfg.mechanisms is None else [str(name) for name in _listed(cfg.mechanisms)]
    settings: Any = OmegaConf.to_container(cfg.settings)
    for name in (*(names or ()), *settings):
        known = hyperparameters(find_mechanism(name))
        for key in settings.get(name) or {}:
            overrides.check_key(OmegaConf.create({"settings": {name: known}}), f"settings.{name}.{key}")
    if names is not None and cfg.network is None:
        raise ValueError("mechanisms= says what to test in a model: name it by network=")
    return names, settings


def _masks(cfg: DictConfig, conf: Path, names: list[str] | None, settings: Mapping[str, Any]) -> Any:
    from thresher.doctor.subjects import subject_of

    torch.manual_seed(cfg.seed)
    subject = subject_of(str(cfg.network), cfg.tokens, conf)
    if subject.mounted and names is not None:
        raise ValueError(
            f"network={cfg.network} holds mechanisms already and is tested with those: leave mechanisms= out"
        )
    every = [] if subject.mounted else available()
    return examined(subject, names if names is not None else every, settings, cfg.where, names is not None)


def _adding(argument: str) -> str:
    """Let a hyper-parameter be set whether conf/doctor.yaml lists it or not."""
    return f"++{argument}" if argument.startswith("settings.") else argument


def _off(rows: Sequence[Mapping[str, Any]], required: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["kernel"] == "off"] if "cpu" in _listed(required) else []


def _said(row: Mapping[str, Any]) -> str:
    if row["refused"]:
        return f"{row['mechanism']}: {row['refused']}"
    moved = ", ".join(f"{what} (outputs move by {row['moved'][what]:.0e})" for what in row["failed"])
    return f"{row['mechanism']} leaks {moved}"


def _write(report: Mapping[str, Any], where: str | None) -> None:
    text = json.dumps(report, indent=1, ensure_ascii=False)
    if where == "-":
        print(text)
    elif where is not None:
        path = Path(where)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


def _listed(value: Any) -> list[Any]:
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return list(plain) if isinstance(plain, list) else [plain]
