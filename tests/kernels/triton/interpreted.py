"""Run the kernels of Triton under its interpreter, as a process of its own; print what the cases give, as JSON.

TRITON_INTERPRET=1 must be set before triton is imported, and starting takes seconds, so one process runs all cases.
"""

import json
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels.triton.cases import BROKEN, CASES, TILE, Case, build_call
from thresher.attention import Attended, Call
from thresher.attention.blocks import Blocks
from thresher.attention.latte import Latte, gpu
from thresher.kernels.triton import backward, forward, lists, pieces
from thresher.kernels.triton.attend import Found
from thresher.testing.inputs import Inputs, cast, draw, gradients


@triton.jit
def see_the_future(rows, shown_rows, keys, shown_keys, shift, CAUSAL: tl.constexpr):  # type: ignore[no-untyped-def]
    return shown_rows[:, None] & shown_keys[None, :]


@triton.jit
def see_padding(mask, group, length, places, valid, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    return valid


@triton.jit
def flatten_slope(difference, keep, theta, tau, keys, always_keep):  # type: ignore[no-untyped-def]
    return tl.where(keep & (keys >= always_keep)[None, :], 1 / (2 * tau), 0)


FAULTS = {
    "future": (forward, "find_visible", see_the_future),
    "padding": (forward, "find_shown", see_padding),
    "slope": (backward, "find_slope", flatten_slope),
}


def build(case: Case, backend: str) -> Latte:
    """Build the mechanism of a case, with other thresholds and factors for each head."""
    cls = Blocks if case.mechanism == "blocks" else Latte
    built = cls(2, case.head_dim, case.pattern, backend=backend, **case.options)  # type: ignore[arg-type]
    with torch.no_grad():
        built.thresholds.offset.copy_(torch.tensor([-0.1, 0.2]))
        if built.tail is not None:
            built.tail.factor.copy_(torch.tensor([0.6, 1.3]))
    return built


def run_case(case: Case) -> dict[str, Any]:
    """Compare the kernels with PyTorch in the same type, and both with PyTorch in fp64."""
    visited: list[Tensor] = []
    attend = gpu.attend

    def record(*inputs: Any) -> Found:
        found = attend(*inputs)
        visited.append(found.visited)
        return found

    ours, exact = build(case, "triton"), build(case, "reference").double()
    gathers = case.mechanism == "blocks" and not ours.gate.into_scores and not case.nan
    plain = build(case, "gather" if gathers else "reference")
    drawn = draw(
        ours, lengths=case.lengths, groups=case.groups, value_dim=case.value_dim, spread=case.spread, seed=case.seed
    )
    inputs, call = cast(drawn, case.dtype), build_call(case)
    if case.nan:
        inputs.v[0, 0, 5] = torch.nan
    module, name, fault = FAULTS.get(case.broken, (pieces, "multiply", pieces.multiply))
    before = getattr(module, name)
    gpu.attend = record
    setattr(module, name, fault)
    try:
        mine = gradients(ours, inputs, call)
    finally:
        gpu.attend = attend
        setattr(module, name, before)
    wide = cast(inputs, torch.float64)
    wanted = gradients(exact, wide, call)
    found = {
        "ours": measure(mine, wanted),
        "plain": measure(gradients(plain, inputs, call), wanted),
        "kept": [mine[0].cost.kept.tolist(), wanted[0].cost.kept.tolist()],
        "visited": visited[0].tolist(),
        "expected": count_tiles(exact, wide, call),
        "dtypes": [str(mine[0].out.dtype), *(str(x.dtype) for x in mine[1].values() if x is not None)],
    }
    if not case.broken:
        assert torch.equal(mine[0].cost.kept, wanted[0].cost.kept), "choose a seed without a key beside the threshold"
    return found


def measure(
    found: tuple[Attended, dict[str, Tensor | None]], wanted: tuple[Attended, dict[str, Tensor | None]]
) -> dict[str, float]:
    """Measure errors of the output, of costs and of all gradients, each divided by the norm of what is right.

    Numbers that should be NaN must be, and no others; otherwise the error is NaN.
    """
    named = [
        {"out": attended.out, **attended.cost._asdict(), **{name: x for name, x in others.items() if x is not None}}
        for attended, others in (found, wanted)
    ]
    assert named[0].keys() == named[1].keys()
    errors = {}
    for name, right in named[1].items():
        one, other = named[0][name].detach().double(), right.detach().double()
        if torch.equal(one.isnan(), other.isnan()):
            one, other = one.nan_to_num(0), other.nan_to_num(0)
        errors[name] = float((one - other).norm() / other.norm().clamp_min(1e-30))
    return errors


@torch.no_grad()
def count_tiles(mechanism: Latte, inputs: Inputs, call: Call) -> list[list[int]]:
    """Count the tiles that each program must read, from the pairs that PyTorch keeps."""
    x = mechanism.prepare(inputs.q, inputs.k, inputs.v, call)
    keep = mechanism.thresholds(mechanism.compare(x)[1], x.visible, mechanism.always_keep, surrogate=False).keep
    keep = keep.expand(x.shape).flatten(0, 1)
    size = mechanism.block.queries if isinstance(mechanism, Blocks) else TILE
    rows = torch.nn.functional.pad(keep, (0, 0, 0, -x.n % size)).unflatten(1, (-1, size)).any(2)
    if not isinstance(mechanism, Blocks):
        return torch.nn.functional.pad(rows, (0, -x.m % TILE)).unflatten(2, (-1, TILE)).any(-1).sum(-1).tolist()
    tiles = (rows.sum(-1) + TILE - 1) // TILE
    return tiles.repeat_interleave(-(-size // TILE), 1).tolist()


if __name__ == "__main__":
    lists.TILE = TILE
    names = sys.argv[1:] or [*CASES, *BROKEN]
    cases = CASES | BROKEN
    print(json.dumps({name: run_case(cases[name]) for name in names}))
