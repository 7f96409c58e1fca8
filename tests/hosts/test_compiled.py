"""Models of every host compile: for one example and several, in training and evaluation, with shapes that change."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("backend", "number"),
    [
        ("strides", "few"),
        pytest.param("strides", "all", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
        pytest.param("inductor", "some", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_compiled_models_compute_what_they_computed(backend: str, number: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.hosts.compiling", backend, number]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-3000:]
