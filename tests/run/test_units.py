"""Runs whose tuning chooses the unit of thresholds: files bring it back, and nothing misreads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.run.test_tune import SHORT, stopping_at
from tests.running import CONF, run_eval, tiny_config
from thresher import load_model
from thresher.attention.shared.thresholds import IN_SPREADS, named_thresholds
from thresher.checkpoints.load import load_checkpoint
from thresher.run import train as training
from thresher.tools.export.__main__ import main as export

NATS = ("task.units=[nats]", "task.steps=2")  # the mechanism is built in spreads


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    training.train(tiny_config(folder, "attention=dense", "compute=free", "trainer.max_epochs=1"))
    return folder / "checkpoints" / "best.ckpt"


def tune(folder: Path, dense: Path, *overrides: str) -> dict[str, float]:
    return training.train(tiny_config(folder, *SHORT, f"init_from='{dense}'", *overrides))


@pytest.fixture(scope="module")
def tuned(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    return folder, tune(folder, dense, *NATS)


def check_same(found: dict[str, float], wanted: dict[str, float]) -> None:
    for name in ("acc", "loss", "kept", "compute"):
        assert found[f"test/{name}"] == wanted[f"test/{name}"]


def find_units(net: Any) -> set[str]:
    return {each.unit for _, each in named_thresholds(net)}


def test_both_units_are_tried_and_named(dense: Path, tmp_path: Path) -> None:
    metrics = tune(tmp_path / "run", dense, "task.units=[spread,nats]", "task.steps=0")
    errors = {name: value for name, value in metrics.items() if name.startswith("tune/") and name.endswith("_error")}
    kinds = ("share", "value", "greedy")
    assert set(errors) == {f"tune/{unit}_{kind}_error" for unit in ("spread", "nats") for kind in kinds}
    assert metrics["tune/error"] == min(errors.values())
    best = min(errors, key=lambda name: errors[name]).removeprefix("tune/").partition("_")[0]
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")["state_dict"]
    assert {bool(x) for name, x in state.items() if name.endswith(IN_SPREADS)} == {best == "spread"}


def test_checkpoints_adapters_and_exports_bring_the_unit_back(
    dense: Path, tuned: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    folder, wanted = tuned
    ckpt = f"ckpt='{folder}/checkpoints/best.ckpt'"
    check_same(run_eval([ckpt, f"run.dir='{tmp_path}/eval'"], CONF), wanted)
    assert "unit: nats" in (tmp_path / "eval" / "config.yaml").read_text()
    check_same(run_eval([ckpt, "attention.unit=nats", f"run.dir='{tmp_path}/same'"], CONF), wanted)
    adapter = f"adapter='{folder}/adapter'"
    check_same(run_eval([f"ckpt='{dense}'", adapter, f"run.dir='{tmp_path}/adapted'"], CONF), wanted)
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    outputs = []
    for name, arguments in {"sparse": [ckpt], "both": [f"ckpt='{dense}'", adapter]}.items():
        assert export([*arguments, f"run.dir='{tmp_path}/{name}'"]) == 0
        net = load_model(tmp_path / name)
        assert find_units(net) == {"nats"}
        outputs.append(net(images))
        check_same(run_eval([f"ckpt='{tmp_path}/{name}'", f"run.dir='{tmp_path}/{name}-eval'"], CONF), wanted)
    assert torch.equal(*outputs)
    recipes = json.loads((folder / "adapter" / "thresher.json").read_text())["mechanisms"].values()
    assert {recipe["hyperparameters"]["unit"] for recipe in recipes} == {"nats"}


@pytest.mark.parametrize("group", [[], ["attention=latte"]], ids=str)
def test_an_evaluation_in_another_unit_is_refused(
    group: list[str], tuned: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    ckpt = f"ckpt='{tuned[0]}/checkpoints/best.ckpt'"
    with pytest.raises(ValueError, match=r"attention\.unit=spread: the thresholds of the checkpoint count in nats"):
        run_eval([ckpt, *group, "attention.unit=spread", f"run.dir='{tmp_path}/eval'"], CONF)
    if group:  # its defaults are in spreads, and no thresholds of it are used
        whole = [*group, "attention.tail=mean", "attention.gate={surrogate: sigmoid}"]
        check_same(run_eval([ckpt, *whole, f"run.dir='{tmp_path}/eval'"], CONF), tuned[1])


def test_a_tuning_in_another_unit_resumes_to_the_same_end(
    tuned: tuple[Path, dict[str, float]], dense: Path, tmp_path: Path
) -> None:
    with stopping_at(1), pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "run", dense, *NATS)
    resumed = tune(tmp_path / "run", dense, *NATS)
    assert {name: value for name, value in resumed.items() if name != "train/seconds"} == {
        name: value for name, value in tuned[1].items() if name != "train/seconds"
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.units=[nat]"], "task.units must be one of nats, spread"),
        (["task.units=nats"], "task.units must be null or a list"),
        (["attention=topk", "attention.per_head=true", "task.units=[nats]"], "is topk, which counts in factors"),
    ],
    ids=" ".join,
)
def test_wrong_units_are_refused(overrides: list[str], message: str, dense: Path, tmp_path: Path) -> None:
    given = [each for each in SHORT if overrides[0] != "attention=topk" or not each.startswith("attention.gate")]
    with pytest.raises(Exception, match=message):
        training.train(tiny_config(tmp_path / "run", *given, f"init_from='{dense}'", *overrides))
