"""The command: inspect the machine, try the kernels, test the masks of a model, and report what fails."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from thresher.attention import available, hyperparameters
from thresher.attention import find as find_mechanism
from thresher.attention.options import check_choice, check_integer, flatten_options
from thresher.config import overrides
from thresher.config.commands import compose_options
from thresher.tools.doctor import backends, machine, show
from thresher.tools.doctor.masks import check_masks

BACKENDS = ("cpu", "cuda")


def doctor(conf: Path, arguments: Sequence[str]) -> int:
    """Inspect this machine and a model; return 1 where a check or a requirement fails, else 0.

    Raises:
        ValueError: An option has a wrong value, or there is no such model.
        FileNotFoundError: There is no such file.
    """
    cfg = compose_options(conf, "doctor", arguments, input_key="network")
    names, settings = check_options(cfg)
    tables = not cfg.json
    report: dict[str, Any] = {"versions": machine.find_versions(), "machine": machine.describe_machine()}
    if tables:
        show.print_machine(report["versions"], report["machine"])
    report["backends"] = backends.try_backends()
    if tables:
        show.print_backends(report["backends"])
    failed = [f"require=cpu: the kernel of {r['mechanism']} is off" for r in _find_off(report["backends"], cfg.require)]
    failed += [f"the kernel of {r['mechanism']}: {r['why']}" for r in report["backends"] if r["kernel"] == "wrong"]
    failed += [
        f"backend=triton of {r['mechanism']}: {r['triton_why']}" for r in report["backends"] if r["triton"] == "wrong"
    ]
    if "cuda" in _as_list(cfg.require) and not torch.cuda.is_available():
        failed.append(f"require=cuda: {machine.explain_missing_cuda()}")
    if cfg.network is not None:
        report["network"] = str(cfg.network)
        report["masks"] = []
        for row in _masks(cfg, conf, names, settings):
            report["masks"].append(row)
            if tables:
                show.print_progress(row)
        failed += [_describe_failure(row) for row in report["masks"] if row["failed"]]
        if tables:
            show.print_masks(report["network"], report["masks"])
    report["failed"] = failed
    text = json.dumps(report, indent=1, ensure_ascii=False)
    if cfg.json:
        print(text)
    if cfg.run.dir is not None:
        path = Path(cfg.run.dir) / "doctor.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    if tables:
        show.print_verdict(failed)
    return int(bool(failed))


def check_options(cfg: DictConfig) -> tuple[list[str] | None, dict[str, Any]]:
    """Check the options; return the mechanisms that were named, and the hyper-parameters.

    Raises:
        ValueError: There is no such choice.
    """
    for name in _as_list(cfg.require):
        check_choice("require", name, BACKENDS)
    check_integer("tokens", cfg.tokens, 8)
    check_integer("seed", cfg.seed, 0)
    names = None if cfg.mechanisms is None else [str(name) for name in _as_list(cfg.mechanisms)]
    settings: Any = OmegaConf.to_container(cfg.settings)
    for name in (*(names or ()), *settings):
        known = hyperparameters(find_mechanism(name))
        for key in flatten_options(settings.get(name) or {}):
            overrides.check_key(OmegaConf.create({"settings": {name: known}}), f"settings.{name}.{key}")
    if names is not None and cfg.network is None:
        raise ValueError("mechanisms= are tested in a model: name it by network=")
    return names, settings


def _masks(cfg: DictConfig, conf: Path, names: list[str] | None, settings: Mapping[str, Any]) -> Any:
    from thresher.tools.doctor.subjects import load_subject

    torch.manual_seed(cfg.seed)
    subject = load_subject(str(cfg.network), cfg.tokens, conf)
    if subject.mounted and names is not None:
        raise ValueError(
            f"network={cfg.network} holds mechanisms already and is tested with them: leave out mechanisms="
        )
    every = [] if subject.mounted else available()
    return check_masks(subject, names if names is not None else every, settings, cfg.where, names is not None)


def _find_off(rows: Sequence[Mapping[str, Any]], required: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["kernel"] == "off"] if "cpu" in _as_list(required) else []


def _describe_failure(row: Mapping[str, Any]) -> str:
    if row["refused"]:
        return f"{row['mechanism']}: {row['refused']}"
    moved = ", ".join(f"{what} (outputs move by {row['moved'][what]:.0e})" for what in row["failed"])
    return f"{row['mechanism']} leaks {moved}"


def _as_list(value: Any) -> list[Any]:
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return list(plain) if isinstance(plain, list) else [plain]
