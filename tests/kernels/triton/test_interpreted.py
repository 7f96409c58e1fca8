"""The kernels of Triton compute what PyTorch computes, by triton's interpreter on a CPU; no GPU is needed.

Starting the interpreter takes seconds, so that one process runs all cases of a mechanism.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.kernels.triton.cases import BROKEN, CASES
from tests.running import CONF
from thresher.kernels.triton.launch import explain_missing_triton

pytestmark = pytest.mark.skipif(explain_missing_triton() is not None, reason=str(explain_missing_triton()))

FEW = ("tail.factor", "thresholds.offset")  # one number a head: PyTorch may happen to round it less than once
ROUNDING = 3e-7  # that is allowed where PyTorch happens to round less: 2.5 units of fp32
NEEDS = {"future": {"kept", "out", "q"}, "padding": {"kept"}, "slope": {"thresholds.offset"}}


def interpret(mechanism: str) -> dict[str, Any]:
    """Run the cases of a mechanism, broken ones included, in a process of their own."""
    root = CONF.parent
    names = [name for name, case in (CASES | BROKEN).items() if case.mechanism == mechanism]
    paths = {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} | paths
    command = [sys.executable, "-m", "tests.kernels.triton.interpreted", *names]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def list_faults(found: dict[str, Any]) -> list[str]:
    """List what is wrong: other keys, other tiles, other costs, or more than twice the error of PyTorch."""
    faults = [] if found["kept"][0] == found["kept"][1] else ["kept"]
    faults += [] if found["visited"] == found["expected"] else ["visited"]
    rounding = torch.finfo(getattr(torch, found["dtypes"][0].removeprefix("torch."))).eps / 2
    for name, error in found["ours"].items():
        least = max(4 * ROUNDING, rounding) if name in FEW else ROUNDING
        if not error <= max(2 * found["plain"][name], least):  # NaN is none
            faults.append(name)
    return faults


@pytest.mark.parametrize("mechanism", ["blocks", "latte"])
def test_outputs_costs_tiles_and_gradients_are_those_of_pytorch(mechanism: str) -> None:
    """Errors against fp64 are at most twice those of PyTorch in the same type; broken kernels are found."""
    found = interpret(mechanism)
    faults = {name: list_faults(each) for name, each in found.items()}
    assert {name: wrong for name, wrong in faults.items() if wrong and name in CASES} == {}
    assert all(found[name]["dtypes"][0] == str(CASES[name].dtype) for name in found if name in CASES)
    broken = [name for name in found if name in BROKEN]
    assert broken
    assert all(NEEDS[name] <= set(faults[name]) for name in broken), {name: faults[name] for name in broken}
    visited = [number for each in found.values() for row in each["visited"] for number in row]
    assert {0, 1, 2} <= set(visited), "lists are empty, short and longer"
    if mechanism == "latte":
        rows = found["latte"]["visited"]
        assert sum(map(sum, rows)) < 9 * len(rows), "of 3 x 3 tiles some are not read"
