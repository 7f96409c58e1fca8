"""The commands as a shell sees them: help in time, one clear message for each mistake, no traceback."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.running import CONF, TINY

ROOT = CONF.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}


def call(script: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.py", ["attention=lattee"], "did you mean latte?"),
        ("train.py", ["attention.thetaa=1"], "did you mean theta?"),
        ("train.py", ["attention.theta 1"], "write key=value"),
        ("train.py", ["compute.target=abc", "trainer.fast_dev_run=true"], "error:"),
        ("train.py", ["attention.theta=-1"], "at least 0"),
        ("train.py", ["data=image_folder", "data.root=nowhere"], "nowhere"),
        ("train.py", ["+attention.unknown=1"], "unknown"),
        ("train.py", ["model=timm", "model.name=vit_tinny"], "timm has no model"),
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


def test_help_answers_before_torch_is_imported() -> None:
    times = []
    for script in ("train.py", "eval.py"):
        start = time.monotonic()
        result = call(script, "--help")
        times.append(time.monotonic() - start)
        assert result.returncode == 0
        assert "attention" in result.stdout
    assert max(times) < 3
    code = "import sys, thresher, thresher.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 0


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


def test_a_config_file_composed_by_hydra_alone_equals_what_train_would_run() -> None:
    result = call("train.py", "--cfg", "job", "attention=dense")
    assert result.returncode == 0
    assert "thresher.attention.dense.Dense" in result.stdout
