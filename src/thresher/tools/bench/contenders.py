"""Contenders: a mechanism of this package or the attention of another, each with its dense baseline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thresher.attention.contract import Attended, Call, Cost
from thresher.attention.mechanism import Mechanism
from thresher.testing.inputs import Inputs
from thresher.tools.bench.inputs import attend_densely, load_inputs, set_thresholds
from thresher.tools.bench.jobs import Job, Scene, build_mechanism, find_pattern
from thresher.tools.bench.timing import Clock, Pass


@dataclass(frozen=True)
class Contender:
    """An implementation of attention to time.

    Attributes:
        attend: Takes inputs; returns outputs and their cost, or None for an uncounted cost.
        module: Holds the trained parameters and the mode, training or evaluation.
        fewest: Smallest number of tokens that it takes.
    """

    attend: Callable[[Inputs], tuple[Tensor, Cost | None]]
    module: nn.Module
    fewest: int = 1

    def forward(self, inputs: Inputs) -> Tensor:
        """Attend as in inference."""
        self.module.eval()
        with torch.no_grad():
            return self.attend(inputs)[0]

    def training(self, inputs: Inputs, gradient: Tensor, clock: Clock) -> tuple[float, float]:
        """Attend and backpropagate as in training; return the seconds of both.

        A cost with a gradient is part of the loss, as under a budget.
        """
        self.module.train()
        fresh = inputs.fresh()
        wanted = [*fresh.leaves().values(), *(p for p in self.module.parameters() if p.requires_grad)]
        start = clock.now()
        out, cost = self.attend(fresh)
        outputs, gradients = [out], [gradient]
        if cost is not None and cost.total.requires_grad:
            ratio = cost.total.sum() / cost.dense.sum()
            outputs, gradients = [out, ratio], [gradient, torch.ones_like(ratio)]
        between = clock.now()
        torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
        return between - start, clock.now() - between

    def passes(self, inputs: Inputs, gradient: Tensor | None, clock: Clock) -> dict[str, Pass]:
        """Return the passes to time: "forward", and "training" if a gradient of the output is given."""

        def forward() -> Sequence[float]:
            start = clock.now()
            self.forward(inputs)
            return (clock.now() - start,)

        if gradient is None:
            return {"forward": forward}
        return {"forward": forward, "training": lambda: self.training(inputs, gradient, clock)}


def build_mechanism_contender(job: Job, scene: Scene) -> tuple[Contender, Contender, Inputs]:
    """Build a mechanism, its dense baseline, and inputs for both."""
    heads, head_dim = scene.heads, scene.head_dim
    mechanism = build_mechanism(job, heads, head_dim).to(scene.device)
    inputs = load_inputs(job, scene, mechanism.needs_source)
    set_thresholds(mechanism, job, scene, inputs)
    return Contender(wrap_mechanism(mechanism), mechanism), build_baseline(job), inputs


def wrap_mechanism(mechanism: Mechanism) -> Callable[[Inputs], tuple[Tensor, Cost | None]]:
    def attend(inputs: Inputs) -> tuple[Tensor, Cost | None]:
        attended: Attended = mechanism(inputs.q, inputs.k, inputs.v, Call(source=inputs.source))
        return attended.out, attended.cost

    return attend


def build_baseline(job: Job) -> Contender:
    """Build the baseline: PyTorch's own dense attention."""
    pattern = find_pattern(job)
    return Contender(lambda inputs: (attend_densely(pattern, inputs), None), nn.Identity())
