"""Evaluations of checkpoints, end to end, on real images with a tiny network."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.running import CONF, run_eval, tiny_config
from thresher.run import train as training


def test_eval_repeats_the_test_of_training_to_all_digits(run: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    folder, metrics = run
    again = run_eval([f"ckpt='{folder}/checkpoints/best.ckpt'", f"run.dir='{tmp_path}/eval'"], CONF)
    assert {k: v for k, v in again.items() if k.startswith("test/")} == {
        k: v for k, v in metrics.items() if k.startswith("test/")
    }
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["test/acc"] == metrics["test/acc"]
    assert (tmp_path / "eval" / "heads.json").read_text() == (folder / "heads.json").read_text()


def test_eval_takes_the_best_checkpoint_of_a_folder(run: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run[0] / "checkpoints", folder / "checkpoints")
    few = "trainer.limit_test_batches=1"
    of_file = run_eval([f"ckpt='{folder}/checkpoints/best.ckpt'", few, f"run.dir='{tmp_path}/file'"], CONF)
    assert run_eval([f"ckpt='{folder}'", few], CONF) == of_file
    (results,) = (folder / "eval").iterdir()
    assert OmegaConf.load(results / "config.yaml").ckpt_path == str(folder / "checkpoints" / "best.ckpt")
    with pytest.raises(FileNotFoundError, match="is neither the folder of a run"):
        run_eval([f"ckpt='{tmp_path}'"], CONF)


def test_eval_takes_overrides_of_values_and_of_the_mechanism(
    run: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    folder, metrics = run
    ckpt = f"ckpt='{folder}/checkpoints/best.ckpt'"
    eight = run_eval([ckpt, "attention.estimate.bits=8", "data.batch_size=7", f"run.dir='{tmp_path}/8'"], CONF)
    assert eight["test/kept"] != metrics["test/kept"]
    dense = run_eval([ckpt, "attention=dense", f"run.dir='{tmp_path}/d'"], CONF)
    assert dense["test/kept"] == dense["test/compute"] == 1.0


def test_eval_takes_groups_before_values(run: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    ckpt = f"ckpt='{run[0]}/checkpoints/best.ckpt'"
    swapped = run_eval([ckpt, "attention.estimate.bits=2", "attention=latte", f"run.dir='{tmp_path}/e'"], CONF)
    assert swapped["test/kept"] != run[1]["test/kept"]


@pytest.mark.parametrize(
    ("trained", "evaluated"),
    [
        ("yoso", "attention.hashes=3"),
        ("yoso", "attention.hash.bits=5"),
        ("yoso", "attention.hash.kind=hadamard"),
        ("smyrf", "attention.rounds=1"),
    ],
)
def test_eval_draws_the_hashes_of_other_settings(trained: str, evaluated: str, tmp_path: Path) -> None:
    training.train(tiny_config(tmp_path / "run", f"attention={trained}", "trainer.max_epochs=1", "test=false"))
    ckpt = f"ckpt='{tmp_path}/run/checkpoints/best.ckpt'"
    first, again = (run_eval([ckpt, evaluated, f"run.dir='{tmp_path}/{name}'"], CONF) for name in ("a", "b"))
    assert first == again
    assert math.isfinite(first["test/acc"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention.thresholda=1"], "did you mean threshold"),
        (["attention.threshold=2"], "own thresholds are used"),
        (["seed=3"], "no effect on an evaluation"),
        (["attention=lattee"], "did you mean latte"),
        (["optimizer=sgd"], "part of what was trained"),
        (["~attention"], "cannot delete"),
        (["attention.threshold=1,2"], "one value"),
        (["attention.threshold 1"], "key=value"),
    ],
)
def test_eval_refuses_wrong_overrides(run: tuple[Path, Any], arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_eval([f"ckpt='{run[0]}/checkpoints/best.ckpt'", *arguments], CONF)


def test_eval_says_which_checkpoints_exist(run: tuple[Path, Any]) -> None:
    with pytest.raises(FileNotFoundError, match=r"best\.ckpt"):
        run_eval([f"ckpt='{run[0]}/checkpoints/besst.ckpt'"], CONF)
    with pytest.raises(ValueError, match="which checkpoint"):
        run_eval([], CONF)
