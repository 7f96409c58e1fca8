"""What a trial costs beyond its own work: the driver between two trials, and the start of train.py.

The bounds are several times what was measured, for machines that do other things, too; docs/sweeps.md has the figures.
"""

import itertools
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sweep.driving import ROOT, run

TRIALS = 12
LIBRARIES = "import pytorch_lightning, torchvision.transforms.v2"
STARTED = """
from pathlib import Path
from thresher import overrides
from thresher.commands import checked
given = ["attention=latte", "compute.target=0.1", "seed=1", "run.name=x", "run.dir=x"]
checked(Path("conf"), "train", given)
cfg = overrides.compose_config(Path("conf"), "train", given)
import hydra, thresher.cli
for group in ("data", "task", "scheduler", "compute"):
    hydra.utils.get_object(cfg[group]._target_)
"""
# Builds of torch for GPUs import jinja2 by themselves.
NEEDLESS = {"datasets", "onnx", "optuna", "plotly", "sqlalchemy", "submitit", "tensorboard", "timm", "wandb"}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads when a process began from Linux's /proc")
def test_the_driver_takes_little_time_between_two_trials(tmp_path: Path) -> None:
    points = f"x={','.join(str(i / TRIALS) for i in range(TRIALS))}"
    code, output = run(tmp_path, "program=tests/sweep/born.py", points=(points,))
    assert code == 0, output
    lives = sorted(
        (json.loads((folder / "metrics.json").read_text())["began"], (folder / "exit_code").stat().st_mtime)
        for folder in (path.parent for path in tmp_path.glob("*/metrics.json"))
    )
    assert len(lives) == TRIALS
    gaps = [began - ended for (_, ended), (began, _) in itertools.pairwise(lives)]
    assert min(gaps) > -0.02  # one after the other; the start of a process is known to a hundredth of a second
    print(f"seconds between two trials: median {statistics.median(gaps):.3f}, most {max(gaps):.3f}")
    assert statistics.median(gaps) < 0.5


def seconds_of_cpu(program: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
def test_a_training_starts_hardly_later_than_its_libraries() -> None:
    libraries, started = (min(seconds_of_cpu(program) for _ in range(2)) for program in (LIBRARIES, STARTED))
    print(f"seconds of CPU: libraries {libraries:.2f}, libraries, imports and composition {started:.2f}")
    assert started - libraries < 3


def test_a_training_imports_no_library_that_it_may_not_need() -> None:
    program = f"{STARTED}\nimport sys; print(*({NEEDLESS!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.split() == []
