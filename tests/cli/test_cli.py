"""The commands as a shell sees them: help at once, one clear message for each mistake, no traceback."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests import warm
from tests.running import CONF, TINY
from thresher.cli.help import build_help

ROOT = CONF.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}


def call(script: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return warm.run([str(ROOT / script), *arguments], cwd, ENVIRONMENT)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.py", ["attention=lattee"], "did you mean latte?"),
        ("train.py", ["attention.thresholdd=1"], "did you mean threshold?"),
        ("train.py", ["attention.threshold 1"], "write key=value"),
        ("train.py", ["compute.target=abc", "trainer.fast_dev_run=true"], "error:"),
        ("train.py", ["attention.threshold=-1"], "at least 0"),
        ("train.py", ["data=image_folder", "data.root=nowhere"], "nowhere"),
        ("train.py", ["+attention.unknown=1"], "unknown"),
        ("train.py", ["model=timm", "model.name=vit_tinny"], "timm has no model"),
        ("train.py", ["-m", "trainer=ddp", "seed=0,1"], "python -m thresher.sweep"),
        ("train.py", ["-m", "trainer.devices=2", "trainer.strategy=ddp", "seed=0,1"], "python -m thresher.sweep"),
        ("train.py", ["-m", "trainer.devices=1,2", "trainer.strategy=ddp"], "python -m thresher.sweep"),
        ("eval.py", ["ckpt=nowhere.ckpt"], "there is no checkpoint"),
        ("eval.py", ["attention=dense"], "which checkpoint?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_message(script: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    if script == "train.py":
        arguments = [*arguments, f"run.dir='{tmp_path}/run'"]
    result = call(script, *arguments, cwd=tmp_path)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_answers_before_torch_is_imported(script: str) -> None:
    command = [sys.executable, str(ROOT / script), "--help"]
    environment = ENVIRONMENT | {"PYTHONPROFILEIMPORTTIME": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0
    assert "attention" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "thresher" in imported
    assert "torch" not in imported


def test_the_help_of_train_lists_its_own_groups_the_default_first() -> None:
    text = build_help(CONF, "train")
    listed = dict(re.findall(r"^([a-z]+): (\w+)", text, re.MULTILINE))
    wanted = [next(iter(e.items())) for e in OmegaConf.load(CONF / "train.yaml").defaults if e != "_self_"]
    assert list(listed) == [group for group, _ in wanted]
    assert {group: listed[group] for group, default in wanted if default} == {g: d for g, d in wanted if d}
    assert text.startswith("Train a network")
    assert "python train.py -m" in text
    assert "$" not in text


def test_public_functions_import_lazily_and_completely() -> None:
    code = (
        "import sys, thresher; [getattr(thresher, n) for n in thresher.__all__];"
        "sys.exit(bool({'timm', 'pytorch_lightning', 'wandb'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 0


def test_a_sweep_gives_each_job_its_folder(tmp_path: Path) -> None:
    tiny = [o for o in TINY if not o.startswith("trainer.max_epochs")]
    result = call(
        "train.py", "-m", "attention=dense,none", *tiny, "trainer.max_epochs=1", f"run.dir='{tmp_path}/sweep'"
    )
    assert result.returncode == 0, result.stderr
    for job in "01":
        assert (tmp_path / "sweep" / job / "metrics.json").is_file()


def test_a_sweep_without_a_folder_makes_one(tmp_path: Path) -> None:
    result = call("train.py", "-m", "seed=-1,-2", cwd=tmp_path)
    assert result.returncode == 1
    assert "seed must be a whole number, 0 .. 4294967295; got -1" in result.stderr
    assert [path.name for path in sorted(tmp_path.glob("runs/multirun/*/*"))] == ["0", "1", "multirun.yaml"]


def test_a_sweep_goes_on_after_a_job_that_failed(tmp_path: Path) -> None:
    tiny = [o for o in TINY if not o.startswith("trainer.max_epochs")]
    jobs = ["attention=dense,latte", "compute=target", "trainer.max_epochs=1", f"run.dir='{tmp_path}/sweep'"]
    result = call("train.py", "-m", *tiny, *jobs)
    assert result.returncode != 0
    assert "compute=free" in result.stderr
    assert not (tmp_path / "sweep" / "0" / "metrics.json").exists()
    assert (tmp_path / "sweep" / "1" / "metrics.json").is_file()


def test_a_run_that_is_not_tested_succeeds_and_its_commands_can_be_typed(tmp_path: Path) -> None:
    result = call("train.py", *TINY, "test=false", "callbacks.watch.moved=0", f"run.dir='{tmp_path}/a run'")
    assert result.returncode == 0, result.stderr
    commands = [shlex.split(line)[1:] for line in result.stdout.splitlines() if line.startswith("  python ")]
    assert [command[0] for command in commands] == ["eval.py", "train.py"]
    evaluated = call(*commands[0], f"run.dir='{tmp_path}/eval'")
    assert evaluated.returncode == 0, evaluated.stderr
    composed = call(*commands[1], "--cfg", "job")
    assert "thresher.attention.dense.Dense" in composed.stdout, composed.stderr


def test_a_config_file_composed_by_hydra_alone_equals_what_train_would_run() -> None:
    result = call("train.py", "--cfg", "job", "attention=dense")
    assert result.returncode == 0
    assert "thresher.attention.dense.Dense" in result.stdout
