"""The kernels of each mechanism: built, run, and compared with PyTorch."""

import time
from typing import Any

import torch

from thresher.attention import Mechanism, Pattern, available, find
from thresher.attention.shared.thresholds import Thresholded
from thresher.testing.comparisons import compare_with_reference
from thresher.testing.inputs import draw

TOKENS, HEADS, HEAD_DIM = 1024, 2, 32
THRESHOLD = 0.5  # drops pairs, whatever the default is
TOLERANCE = 1e-3  # of the norm


def try_backends() -> list[dict[str, Any]]:
    """Try every kernel; return rows of `mechanism`, `kernel` ("on", "off", "wrong" or "none") and `why`."""
    return [{"mechanism": name} | _try_kernel(find(name)) for name in available()]


def _try_kernel(cls: type[Mechanism]) -> dict[str, str]:
    if not any(implementation.backend == "cpu" for implementation in cls.implementations):
        return {"kernel": "none", "why": "PyTorch computes it everywhere"}
    pattern = next(pattern for pattern in Pattern if pattern in cls.supports)
    start = time.monotonic()
    try:
        fast = build_seeded(cls, pattern, "cpu")
    except ValueError as error:
        return {"kernel": "off", "why": str(error)}
    reference = build_seeded(cls, pattern, "reference")
    inputs = draw(fast, batch=1, lengths=(TOKENS, TOKENS), dtype=torch.float32)
    try:
        differences = compare_with_reference(fast, reference, inputs, TOLERANCE, name="its kernel")
    except AssertionError as error:
        return {"kernel": "wrong", "why": f"{error}; use attention.backend=reference"}
    seconds = time.monotonic() - start
    why = f"differs from PyTorch's output by {differences['output']:.0e}, tried in {seconds:.1f} s"
    return {"kernel": "on", "why": why}


def build_seeded(cls: type[Mechanism], pattern: Pattern, backend: str) -> Mechanism:
    """Build a mechanism for one backend, with the same random numbers as for any other."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        mechanism = cls(HEADS, HEAD_DIM, pattern, backend=backend).eval()  # type: ignore[arg-type]
    if isinstance(mechanism, Thresholded):
        mechanism.thresholds.set_base(THRESHOLD)
    return mechanism
