"""What a trial brings beyond its own work: one worker runs one trial at a time, and train.py imports what it needs."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.sweep.driving import ROOT, run

TRIALS = 4
STARTED = """
from pathlib import Path
from thresher.config import overrides
from thresher.cli.main import check_arguments
given = ["attention=latte", "compute.target=0.1", "seed=1", "run.name=x", "run.dir=x"]
check_arguments(Path("conf"), "train", given)
cfg = overrides.compose_config(Path("conf"), "train", given)
import hydra, thresher.run.train
for group in ("data", "task", "scheduler", "compute"):
    hydra.utils.get_object(cfg[group]._target_)
"""
# Builds of torch for GPUs import jinja2 by themselves.
NEEDLESS = {"datasets", "onnx", "optuna", "plotly", "sqlalchemy", "submitit", "tensorboard", "timm", "wandb"}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads when a process began from Linux's /proc")
def test_one_worker_runs_one_trial_at_a_time(tmp_path: Path) -> None:
    points = f"x={','.join(str(i / TRIALS) for i in range(TRIALS))}"
    code, output = run(tmp_path, "program=tests/tools/sweep/born.py", points=(points,))
    assert code == 0, output
    lives = sorted(
        (json.loads((folder / "metrics.json").read_text())["began"], (folder / "exit_code").stat().st_mtime)
        for folder in (path.parent for path in tmp_path.glob("*/metrics.json"))
    )
    assert len(lives) == TRIALS
    tick = 0.02  # the start of a process is known to a hundredth of a second
    assert all(ended < began + tick for (_, ended), (began, _) in itertools.pairwise(lives))


def test_a_training_imports_no_library_that_it_may_not_need() -> None:
    program = f"{STARTED}\nimport sys; print(*({NEEDLESS!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.split() == []
