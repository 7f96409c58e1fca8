"""A sweep of eval.py: one checkpoint at several settings, without training."""

from pathlib import Path

import pytest

from tests.running import tiny_config
from tests.tools.sweep.driving import finished, run, trials
from thresher.run import train as training


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_at_every_setting(tmp_path: Path) -> None:
    training.train(tiny_config(tmp_path / "trained", "trainer.max_epochs=1", "callbacks.watch.moved=0"))
    points = (f"ckpt='{tmp_path}/trained/checkpoints/best.ckpt'", "attention.estimate.bits=2,8")
    code, output = run(tmp_path / "sweep", "program=eval.py", "minimize=[test/compute]", points=points)
    assert code == 0, output
    assert sorted(finished(tmp_path / "sweep").values()) == [1, 1]
    few, many = sorted(trial.values[1] for trial in trials(tmp_path / "sweep") if trial.values)
    assert few < many  # an estimate of more bits costs more
