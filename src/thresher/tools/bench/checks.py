"""The contract checks that a job must pass before it is timed, at its own settings, backend, device and type."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from thresher.attention.contract import Call
from thresher.attention.mechanism import Mechanism
from thresher.attention.shared.thresholds import Thresholded
from thresher.testing.comparisons import compare_with_expectation, compare_with_reference, compare_with_softmax
from thresher.testing.inputs import Inputs, cast, softmax_attention
from thresher.tools.bench.inputs import calibrate_to_share, draw_inputs
from thresher.tools.bench.jobs import AUTO, REFERENCE, Job, Scene, build_mechanism, find_backends, load_mechanism_class

TOKENS = 1024  # at most
BATCH, HEADS = 2, 2
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # of the largest
BACKEND_FACTOR = 100  # times the tolerance, relative in norm
DRAWS, FACTOR = 4, 1.5  # of a stochastic mechanism, whose errors in half precision are rounding in part


def check(job: Job, scene: Scene) -> None:
    """Check the mechanism of a job.

    Raises:
        AssertionError: It breaks its contract; the message says where.
    """
    cls = load_mechanism_class(job.target or "")
    inputs = draw_inputs(scene, min(job.n, TOKENS), BATCH, HEADS, cls.needs_source)
    build_one = partial(_build_seeded, job, scene)
    if cls.dense_limit is not None:
        allow = partial(_allow_of_largest, TOLERANCE[scene.torch_dtype])
        # A backend may refuse the limit, as LATTE's kernels refuse exact estimates; it is compared with the reference.
        mechanism = _build_seeded(replace(job, backend=job.backend and AUTO), scene, **cls.dense_limit)
        exact = softmax_attention(mechanism, cast(inputs, torch.float64), Call())
        compare_with_softmax(mechanism, inputs, Call(), exact, allow)
    if cls.stochastic and cls.precise is not None:
        compare_with_expectation(build_one(), build_one(**cls.precise), inputs, DRAWS, FACTOR)
    if not cls.stochastic and job.backend not in (None, REFERENCE) and REFERENCE in find_backends(cls):
        check_backend(job, scene, inputs)


def check_backend(job: Job, scene: Scene, inputs: Inputs) -> None:
    """Check the backend of a job at the share that the job keeps."""
    fast = _build_seeded(job, scene)
    if job.kept is not None and isinstance(fast, Thresholded):
        calibrate_to_share(fast, inputs.q, inputs.k, Call(), job.kept)
    reference = _build_seeded(replace(job, backend=REFERENCE), scene)
    tolerance = BACKEND_FACTOR * TOLERANCE[scene.torch_dtype]
    compare_with_reference(fast, reference, inputs, tolerance, name=str(job.backend))


def _allow_of_largest(tolerance: float, wanted: Tensor) -> Tensor:
    return tolerance * wanted.abs().max()


def _build_seeded(job: Job, scene: Scene, **changes: object) -> Mechanism:
    torch.manual_seed(scene.seed)
    return build_mechanism(job, HEADS, scene.head_dim, **changes).to(scene.device)
