"""Which backends of each mechanism are on: a kernel is built, run, and compared with PyTorch."""

import time
from typing import Any

import torch

from thresher.attention import Call, Mechanism, Pattern, available, find, hyperparameters
from thresher.attention.base import ValueSource
from thresher.attention.thresholds import Thresholded

TOKENS, HEADS, HEAD_DIM = 1024, 2, 32
DROPPING = 0.5  # thresholds at which pairs are dropped, whatever they are in by default
TOLERANCE = 1e-3  # of the norm: a tie that rounding breaks the other way moves a row, not the whole


def backends() -> list[dict[str, Any]]:
    """Return a row for each mechanism: `mechanism`, `kernel` ("on", "off", "wrong" or "none") and `why`."""
    return [{"mechanism": name} | _kernel(find(name)) for name in available()]


def _kernel(cls: type[Mechanism]) -> dict[str, str]:
    if "backend" not in hyperparameters(cls):
        return {"kernel": "none", "why": "PyTorch computes it everywhere"}
    pattern = next(pattern for pattern in Pattern if pattern in cls.supports)
    start = time.monotonic()
    try:
        fast = _seeded(cls, pattern, "cpu")
    except ValueError as error:
        return {"kernel": "off", "why": str(error)}
    off = _distance(fast, _seeded(cls, pattern, "reference"))
    if not off <= TOLERANCE:
        return {"kernel": "wrong", "why": f"its output is off PyTorch's by {off:.1e}; use attention.backend=reference"}
    return {"kernel": "on", "why": f"off PyTorch's output by {off:.0e}, {time.monotonic() - start:.1f} s to try"}


def _seeded(cls: type[Mechanism], pattern: Pattern, backend: str) -> Mechanism:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        mechanism = cls(HEADS, HEAD_DIM, pattern, backend=backend).eval()  # type: ignore[call-arg]
    if isinstance(mechanism, Thresholded):
        mechanism.thresholds.set_base(DROPPING)
    return mechanism


@torch.no_grad()
def _distance(one: Mechanism, other: Mechanism) -> float:
    """Return how far apart two outputs are, relative to the norm of the second."""
    rng, width = torch.Generator().manual_seed(0), HEADS * HEAD_DIM
    q, k = torch.randn(2, 1, HEADS, TOKENS, HEAD_DIM, generator=rng)
    source = ValueSource(torch.randn(1, TOKENS, width, generator=rng), torch.randn(width, width, generator=rng), None)
    v = torch.nn.functional.linear(*source).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
    call = Call(source=source if one.needs_source else None)
    outs = [mechanism(q, k, v, call).out for mechanism in (one, other)]
    return float((outs[0] - outs[1]).norm() / outs[1].norm())
