"""Rows small enough for tests: the real mechanisms of conf/attention, at a few tokens."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tests.running import CONF
from thresher.config.commands import compose_options
from thresher.tools.bench.jobs import Job, Scene
from thresher.tools.bench.records import build_record
from thresher.tools.bench.rows import read_attention_config

SCENE: dict[str, Any] = {
    "batch": 1,
    "heads": 2,
    "head_dim": 16,
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "repetitions": 3,
    "seconds": 60.0,
    "backward": True,
    "memory": True,
    "inputs": "random",
    "seed": 0,
}


def scene(**changes: Any) -> Scene:
    return Scene(**SCENE | changes)


def job(name: str, n: int = 64, pattern: str = "noncausal_self", kept: float | None = None, **changes: Any) -> Job:
    """Return a row of a mechanism as conf/attention has it."""
    config = read_attention_config(CONF, name)
    usual = {key: value for key, value in config.items() if key != "backend" and not key.startswith("_")}
    return Job(name, config["_target_"], usual | changes, kept, "", None, pattern, n)


def broken(name: str, module: str = "broken", n: int = 64) -> Job:
    """Return a row of a mechanism that breaks the contract."""
    return Job(name, f"tests.attention.{module}.{name}", {}, None, "", None, "noncausal_self", n)


def record(n: int = 64, name: str = "topk", **measured: Any) -> dict[str, Any]:
    """Return the record of a row with some of its numbers."""
    status = measured.pop("status", "ok")
    return build_record(job(name, n), scene(), measured, status, "")


def options(*given: str) -> Any:
    """Compose conf/bench.yaml."""
    return compose_options(CONF, "bench", given)


def with_mechanism(folder: Path, name: str, target: str) -> Path:
    """Return a folder of configs that has one mechanism more."""
    import shutil

    shutil.copytree(CONF, folder)
    (folder / "attention" / f"{name}.yaml").write_text(OmegaConf.to_yaml({"_target_": target, "_partial_": True}))
    return folder
