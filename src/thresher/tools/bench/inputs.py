"""Inputs of a call, drawn at random or recorded from a trained network, and thresholds calibrated on them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.contract import Call, Pattern, ValueSource
from thresher.attention.mechanism import Mechanism
from thresher.attention.shared.functional import promote_to_fp32
from thresher.attention.shared.thresholds import Thresholded
from thresher.budget.calibration import calibrate, list_rows, select_queries
from thresher.testing.inputs import Inputs, project_values
from thresher.tools.bench.jobs import Job, Scene, find_pattern

SAMPLED_PAIRS = 2**24  # whose differences are in memory at a time while thresholds are calibrated


def load_inputs(job: Job, scene: Scene, with_source: bool = False) -> Inputs:
    """Load the inputs of a job, the same for every contender of its pattern and length.

    Raises:
        ValueError: A mechanism samples the projection of values, which is not recorded.
    """
    if scene.inputs != "random":
        if with_source:
            raise ValueError("samples the projection of values, which is not recorded: inputs=random")
        recorded = read_recording(scene, job.pattern)
        q, k, v = (recorded[name].to(scene.device, scene.torch_dtype) for name in "qkv")
        return Inputs(q[:, :, : job.n].contiguous(), k[:, :, : job.n].contiguous(), v[:, :, : job.n].contiguous())
    return draw_inputs(scene, job.n, scene.batch, scene.heads, with_source)


def draw_inputs(scene: Scene, n: int, batch: int, heads: int, with_source: bool) -> Inputs:
    """Draw standard normal queries, keys and values."""
    rng = torch.Generator().manual_seed(scene.seed)
    shape, width = (batch, heads, n, scene.head_dim), heads * scene.head_dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(scene.device, scene.torch_dtype)

    q, k = draw(*shape), draw(*shape)
    if not with_source:
        return Inputs(q, k, draw(*shape))
    source = ValueSource(draw(batch, n, width), draw(width, width) / width**0.5, None)
    return Inputs(q, k, project_values(source, heads), source)


def read_recording(scene: Scene, pattern: str) -> dict[str, Any]:
    """Read the recording of one pattern."""
    recorded: dict[str, Any] = torch.load(scene.inputs, weights_only=True)[pattern]
    return recorded


def set_thresholds(mechanism: Mechanism, job: Job, scene: Scene, inputs: Inputs) -> None:
    """Set the thresholds of a mechanism: calibrated to the share of the job, or the trained ones of a recording.

    Raises:
        ValueError: The mechanism has no thresholds, or none were recorded.
    """
    if job.kept is not None:
        if not isinstance(mechanism, Thresholded):
            raise ValueError(f"kept={job.kept:g}: {job.name} has no thresholds that could be calibrated")
        calibrate_to_share(mechanism, inputs.q, inputs.k, Call(), job.kept)
    elif scene.inputs != "random" and isinstance(mechanism, Thresholded):
        trained = read_recording(scene, job.pattern).get("thresholds")
        if trained is None:
            raise ValueError("kept=null takes the trained thresholds, but the checkpoint's attention has none")
        mechanism.thresholds.load_state_dict(trained)


@torch.no_grad()
def calibrate_to_share(mechanism: Mechanism, q: Tensor, k: Tensor, call: Call, kept: float) -> None:
    """Calibrate the thresholds of a mechanism to keep a share of the visible pairs of these queries and keys.

    Where all pairs would take too much memory, evenly spaced queries stand for all, in whole blocks where those of a
    block choose keys together.
    """
    differing = _ScoreReader(mechanism)
    heads, n, m = q.shape[1], q.shape[2], k.shape[2]
    size = min(n, max(SAMPLED_PAIRS // (heads * m), 1))
    examples = max(SAMPLED_PAIRS // (heads * m * size), 1)
    together = differing.rows_together
    blocks, chosen = -(-n // together), max(size // together, 1)
    rows = list_rows((torch.arange(chosen, device=q.device) * blocks + blocks // 2) // chosen, n, together)
    some, sampled = select_queries(q[:examples], m, call.examples(slice(examples)), mechanism.pattern, rows)
    batch = (some, k[:examples], k[:examples], sampled)
    calibrate(differing, [batch], kept, forward=lambda call_of: differing(*call_of))


class _ScoreReader(torch.nn.Module):
    """Stands for a mechanism in a calibration, which reads its differences without attending."""

    def __init__(self, mechanism: Mechanism) -> None:
        super().__init__()
        assert isinstance(mechanism, Thresholded)
        self.thresholds, self.pattern = mechanism.thresholds, mechanism.pattern
        self.measure_differences, self.rows_together = mechanism.measure_differences, mechanism.rows_together

    def forward(self, *_: Any) -> None:
        """Attend to nothing."""


def attend_densely(pattern: Pattern, inputs: Inputs) -> Tensor:
    """Attend by PyTorch's own kernel, with `is_causal` rather than a mask; project v if the mechanism does."""
    v = inputs.v if inputs.source is None else project_values(inputs.source, inputs.k.shape[1])
    return F.scaled_dot_product_attention(inputs.q, inputs.k, v, is_causal=pattern is Pattern.CAUSAL_SELF)


def attend_exactly(job: Job, inputs: Inputs) -> Tensor:
    """Attend in fp32 or fp64; errors are relative to the result."""
    q, k, v = (promote_to_fp32(x) for x in (inputs.q, inputs.k, inputs.v))
    return attend_densely(find_pattern(job), Inputs(q, k, v))
