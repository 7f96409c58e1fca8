"""The commands that a training suggests are commands that work."""

from types import SimpleNamespace
from typing import Any

from thresher.run.results import suggest_commands


def test_the_dense_baseline_has_the_schedule_and_none_of_the_losses_of_sparse_attention() -> None:
    config = {"attention": {"_target_": "a.Blocks"}, "task": {"_target_": "a.Classification"}}
    given = ["attention=blocks", "attention.block.keys=4", "+task.auxiliary.gate=0.5", "task.distill=1", "seed=3"]
    given += ["compute.target=0.1", "task.label_smoothing=0.1", "run.dir=out"]
    run: Any = SimpleNamespace(config=SimpleNamespace(**config), overrides=given)
    found = suggest_commands(run, "")
    assert list(found.values()) == ["python train.py attention=dense compute=free seed=3 task.label_smoothing=0.1"]
