"""Several processes by the commands that people use: sharded weights train as replicated ones do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.running import CONF, TINY, run_eval

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
TWO = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true", "trainer.max_epochs=1")


def train(folder: Path, *overrides: str) -> dict[str, torch.Tensor]:
    command = [sys.executable, "train.py", *TINY, *TWO, f"run.dir='{folder}'", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    state: dict[str, torch.Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


@pytest.mark.slow
def test_an_average_of_sharded_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="averages whole weights, not sharded ones"):
        train(tmp_path / "run", "trainer=fsdp", "callbacks=ema")


@pytest.mark.slow
def test_sharded_weights_train_as_replicated_ones(tmp_path: Path) -> None:
    replicated = train(tmp_path / "ddp", "trainer=ddp", "test=false")
    sharded = train(tmp_path / "fsdp", "trainer=fsdp")
    assert sharded.keys() == replicated.keys()
    for name, value in sharded.items():
        torch.testing.assert_close(value, replicated[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    moved = [value for name, value in sharded.items() if name.endswith("offset")]
    assert moved
    assert all(bool(value.any()) for value in moved)

    train(tmp_path / "fixed", "trainer=fsdp", "test=false", "attention.trainable=false")

    kept = run_eval([f"ckpt='{tmp_path}/fsdp/checkpoints/best.ckpt'", "trainer=cpu"], CONF)["test/kept"]
    assert 0 < kept <= 1
