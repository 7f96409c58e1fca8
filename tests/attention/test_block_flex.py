"""Run the tests of FlexAttention (block_flex.py) in a process of their own.

FlexAttention starts threads of autograd, and a process that has them must not fork; tests of several processes do.
"""

import os
import subprocess
import sys

import pytest

from tests.running import CONF

ROOT = CONF.parent


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_flex_attention_in_a_process_of_its_own(which: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-m", which]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]  # of the worker that runs this test
    done = subprocess.run(
        [*command, "tests/attention/block_flex.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
