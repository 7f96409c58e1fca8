"""The kernels of each mechanism: built, run, and compared with PyTorch."""

import time
from typing import Any

import torch

from thresher.attention import Mechanism, Pattern, available, find
from thresher.attention.shared.thresholds import Thresholded
from thresher.testing.comparisons import compare_with_reference
from thresher.testing.inputs import draw
from thresher.tools.doctor.machine import explain_missing_cuda

TOKENS, HEADS, HEAD_DIM = 1024, 2, 32
THRESHOLD = 0.5  # drops pairs, whatever the default is
TOLERANCE = 1e-3  # of the norm


def try_backends() -> list[dict[str, Any]]:
    """Try every kernel.

    Returns:
        Rows of `mechanism`; `kernel`, what the one for CPUs is ("on", "off", "wrong" or "none"), and `why`; `triton`,
        the same of those for GPUs, and `triton_why`.
    """
    return [{"mechanism": name} | _try_kernel(find(name)) | _try_triton(find(name)) for name in available()]


def _try_kernel(cls: type[Mechanism]) -> dict[str, str]:
    if not _has(cls, "cpu"):
        return {"kernel": "none", "why": "PyTorch computes it everywhere"}
    kernel, why = _compare(cls, "cpu", torch.device("cpu"))
    return {"kernel": kernel, "why": why}


def _try_triton(cls: type[Mechanism]) -> dict[str, str]:
    if not _has(cls, "triton"):
        return {"triton": "none", "triton_why": ""}
    if not torch.cuda.is_available():
        return {"triton": "off", "triton_why": explain_missing_cuda()}
    triton, why = _compare(cls, "triton", torch.device("cuda"))
    return {"triton": triton, "triton_why": why}


def _has(cls: type[Mechanism], backend: str) -> bool:
    return any(implementation.backend == backend for implementation in cls.implementations)


def _compare(cls: type[Mechanism], backend: str, device: torch.device) -> tuple[str, str]:
    """Compare a backend with PyTorch on a device; return what it is, and why."""
    pattern = next(pattern for pattern in Pattern if pattern in cls.supports)
    start = time.monotonic()
    try:
        fast = build_seeded(cls, pattern, backend).to(device)
        reference = build_seeded(cls, pattern, "reference").to(device)
        inputs = draw(fast, batch=1, lengths=(TOKENS, TOKENS), dtype=torch.float32)
        inputs = inputs.with_leaves({name: x.to(device) for name, x in inputs.leaves().items()})
        differences = compare_with_reference(fast, reference, inputs, TOLERANCE, name="its kernel")
    except ValueError as error:
        return "off", str(error)
    except AssertionError as error:
        return "wrong", f"{error}; use attention.backend=reference"
    seconds = time.monotonic() - start
    return "on", f"differs from PyTorch's output by {differences['output']:.0e}, tried in {seconds:.1f} s"


def build_seeded(cls: type[Mechanism], pattern: Pattern, backend: str) -> Mechanism:
    """Build a mechanism for one backend, with the same random numbers as for any other."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        mechanism = cls(HEADS, HEAD_DIM, pattern, backend=backend).eval()  # type: ignore[arg-type]
    if isinstance(mechanism, Thresholded):
        mechanism.thresholds.set_base(THRESHOLD)
    return mechanism
