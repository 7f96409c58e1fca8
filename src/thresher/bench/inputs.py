"""Queries, keys and values: drawn at random, or recorded from a trained network; and thresholds that fit them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.base import Call, Mechanism, Pattern, ValueSource
from thresher.attention.functional import at_least_fp32
from thresher.attention.thresholds import Thresholded
from thresher.bench.jobs import Job, Scene, pattern_of
from thresher.calibration import calibrate, some_queries

SAMPLED_PAIRS = 2**24  # whose differences are in memory at a time while thresholds are calibrated


class Inputs(NamedTuple):
    """What one call gets. `source` is what v was projected from, for mechanisms that sample that projection."""

    q: Tensor
    k: Tensor
    v: Tensor
    source: ValueSource | None = None

    def leaves(self) -> list[Tensor]:
        """Return the tensors that gradients are taken for."""
        return [self.q, self.k, self.v] if self.source is None else [self.q, self.k, self.source.x, self.source.weight]

    def fresh(self) -> "Inputs":
        """Return the same values as leaves of a new graph."""
        q, k = (x.detach().requires_grad_() for x in (self.q, self.k))
        if self.source is None:
            return Inputs(q, k, self.v.detach().requires_grad_())
        x, weight = (x.detach().requires_grad_() for x in (self.source.x, self.source.weight))
        source = ValueSource(x, weight, None)
        return Inputs(q, k, projected(source, k.shape[1]), source)

    def double(self) -> "Inputs":
        """Return the same values in fp64."""
        source = self.source and ValueSource(self.source.x.double(), self.source.weight.double(), None)
        return Inputs(self.q.double(), self.k.double(), self.v.double(), source)

    def first(self, n: int) -> "Inputs":
        """Return the first n tokens."""
        source = self.source and self.source._replace(x=self.source.x[:, :n])
        return Inputs(self.q[:, :, :n], self.k[:, :, :n], self.v[:, :, :n], source)


def projected(source: ValueSource, heads: int) -> Tensor:
    """Return the values that come of a source."""
    return F.linear(source.x, source.weight, source.bias).unflatten(-1, (heads, -1)).transpose(1, 2)


def inputs_of(job: Job, scene: Scene, with_source: bool = False) -> Inputs:
    """Return the inputs of a job: the same for every contender of that pattern and length.

    Raises:
        ValueError: Values were recorded, and a mechanism needs to know what they were projected from.
    """
    if scene.inputs != "random":
        if with_source:
            raise ValueError("samples the projection of values, which is not recorded: bench.inputs=random")
        recorded = recorded_inputs(scene, job.pattern)
        q, k, v = (recorded[name].to(scene.device, scene.torch_dtype) for name in "qkv")
        return Inputs(q[:, :, : job.n].contiguous(), k[:, :, : job.n].contiguous(), v[:, :, : job.n].contiguous())
    return random_inputs(scene, job.n, scene.batch, scene.heads, with_source)


def random_inputs(scene: Scene, n: int, batch: int, heads: int, with_source: bool) -> Inputs:
    """Draw standard normal queries, keys and values."""
    rng = torch.Generator().manual_seed(scene.seed)
    shape, width = (batch, heads, n, scene.head_dim), heads * scene.head_dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(scene.device, scene.torch_dtype)

    q, k = draw(*shape), draw(*shape)
    if not with_source:
        return Inputs(q, k, draw(*shape))
    source = ValueSource(draw(batch, n, width), draw(width, width) / width**0.5, None)
    return Inputs(q, k, projected(source, heads), source)


def recorded_inputs(scene: Scene, pattern: str) -> dict[str, Any]:
    """Read what was recorded of the attention in one pattern."""
    recorded: dict[str, Any] = torch.load(scene.inputs, weights_only=True)[pattern]
    return recorded


def set_thresholds(mechanism: Mechanism, job: Job, scene: Scene, inputs: Inputs) -> None:
    """Give a mechanism the thresholds that a job asks for: calibrated on its inputs, or those that were trained.

    Raises:
        ValueError: It has none, or none were recorded.
    """
    if job.kept is not None:
        if not isinstance(mechanism, Thresholded):
            raise ValueError(f"kept={job.kept:g}: {job.name} has no thresholds that could be calibrated")
        keep_share(mechanism, inputs.q, inputs.k, Call(), job.kept)
    elif scene.inputs != "random" and isinstance(mechanism, Thresholded):
        trained = recorded_inputs(scene, job.pattern).get("thresholds")
        if trained is None:
            raise ValueError("kept=null takes the trained thresholds, but the checkpoint's attention has none")
        mechanism.thresholds.load_state_dict(trained)


@torch.no_grad()
def keep_share(mechanism: Mechanism, q: Tensor, k: Tensor, call: Call, kept: float) -> None:
    """Calibrate the thresholds of a mechanism to keep a share of the visible pairs of these queries and keys.

    A sample of evenly spaced queries is read where all pairs would take too much memory.
    """
    heads, n, m = q.shape[1], q.shape[2], k.shape[2]
    size = min(n, max(SAMPLED_PAIRS // (heads * m), 1))
    examples = max(SAMPLED_PAIRS // (heads * m * size), 1)
    rows = (torch.arange(size, device=q.device) * n + n // 2) // size
    some, sampled = some_queries(q[:examples], m, call.examples(slice(examples)), mechanism.pattern, rows)
    batch = (some, k[:examples], k[:examples], sampled)
    differing = _Differing(mechanism)
    calibrate(differing, [batch], kept, forward=lambda call_of: differing(*call_of))


class _Differing(torch.nn.Module):
    """Stands for a mechanism in a calibration: its differences are read without attending."""

    def __init__(self, mechanism: Mechanism) -> None:
        super().__init__()
        assert isinstance(mechanism, Thresholded)
        self.thresholds, self.pattern, self.differences = mechanism.thresholds, mechanism.pattern, mechanism.differences

    def forward(self, *_: Any) -> None:
        """Attend to nothing."""


def dense(pattern: Pattern, inputs: Inputs) -> Tensor:
    """Attend by PyTorch's own kernel, told of causality rather than handed a mask; v is projected where that counts."""
    v = inputs.v if inputs.source is None else projected(inputs.source, inputs.k.shape[1])
    return F.scaled_dot_product_attention(inputs.q, inputs.k, v, is_causal=pattern is Pattern.CAUSAL_SELF)


def exact(job: Job, inputs: Inputs) -> Tensor:
    """Return softmax attention in fp32 at least, which errors are relative to."""
    q, k, v = (at_least_fp32(x) for x in (inputs.q, inputs.k, inputs.v))
    return dense(pattern_of(job), Inputs(q, k, v))
