"""wandb's own formatter turns each sweep file into a command that composes."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from tests.running import CONF
from thresher.config import overrides

FILES = sorted((CONF / "wandb").glob("*.yaml"))


def values(parameter: dict[str, Any]) -> list[Any]:
    return parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_value_arrives(path: Path) -> None:
    sweep = yaml.safe_load(path.read_text())
    assert sweep["program"] == "train.py"
    fixed = [a for a in sweep["command"] if not a.startswith("${")]
    assert sweep["command"][-1] == "${args_no_hyphens}"
    options = {name: values(parameter) for name, parameter in sweep["parameters"].items()}
    width = max(map(len, options.values()))
    for i in range(width):
        chosen = {name: many[i % len(many)] for name, many in options.items()}
        rendered = create_sweep_command_args({"args": {k: {"value": v} for k, v in chosen.items()}})
        given = [*fixed, *rendered["args_no_hyphens"]]
        overrides.check(CONF, "train", given)
        cfg = overrides.compose_config(CONF, "train", [*given, "run.name=x", "run.dir=y"])
        assert "wandb" in cfg.logger
        for name, value in chosen.items():
            if overrides.is_group(CONF, name):
                source = OmegaConf.load(CONF / name / f"{value}.yaml")
                assert cfg[name]["_target_"] == source["_target_"]
            else:
                assert OmegaConf.select(cfg, name) == (None if value == "null" else value)


def test_there_are_grids_a_bayesian_one_and_nulls() -> None:
    sweeps = [yaml.safe_load(path.read_text()) for path in FILES]
    assert {sweep["method"] for sweep in sweeps} == {"grid", "bayes"}
    everything = itertools.chain.from_iterable(sweep["parameters"].values() for sweep in sweeps)
    assert any("null" in parameter.get("values", ()) for parameter in everything)
