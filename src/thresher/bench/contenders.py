"""What is timed: a mechanism of ours or another package's attention, and the dense baseline beside each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thresher.attention.base import Attended, Call, Cost, Mechanism
from thresher.bench.inputs import Inputs, dense, inputs_of, set_thresholds
from thresher.bench.jobs import Job, Scene, build, pattern_of
from thresher.bench.timing import Clock, Pass


@dataclass(frozen=True)
class Contender:
    """Something that attends to inputs.

    Attributes:
        attend: Takes inputs; returns outputs and their cost, None where nobody counts it.
        module: What is put into training or evaluation mode, and holds parameters that are trained.
        fewest: Tokens that it can attend to at least.
    """

    attend: Callable[[Inputs], tuple[Tensor, Cost | None]]
    module: nn.Module
    fewest: int = 1

    def forward(self, inputs: Inputs) -> Tensor:
        """Attend as inference does."""
        self.module.eval()
        with torch.no_grad():
            return self.attend(inputs)[0]

    def training(self, inputs: Inputs, gradient: Tensor, clock: Clock) -> tuple[float, float]:
        """Attend and go back as training does; return the seconds of both.

        What costs have a gradient count in the loss, as they do under a budget.
        """
        self.module.train()
        fresh = inputs.fresh()
        wanted = fresh.leaves() + [p for p in self.module.parameters() if p.requires_grad]
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
        """Return what to time: "forward", and "training" where there is a gradient of the output."""

        def forward() -> Sequence[float]:
            start = clock.now()
            self.forward(inputs)
            return (clock.now() - start,)

        if gradient is None:
            return {"forward": forward}
        return {"forward": forward, "training": lambda: self.training(inputs, gradient, clock)}


def mechanism_contender(job: Job, scene: Scene) -> tuple[Contender, Contender, Inputs]:
    """Return a mechanism of ours, the dense baseline of the same work, and inputs for both."""
    heads, head_dim = scene.heads, scene.head_dim
    mechanism = build(job, heads, head_dim).to(scene.device)
    inputs = inputs_of(job, scene, mechanism.needs_source)
    set_thresholds(mechanism, job, scene, inputs)
    return Contender(attending(mechanism), mechanism), baseline(job), inputs


def attending(mechanism: Mechanism) -> Callable[[Inputs], tuple[Tensor, Cost | None]]:
    def attend(inputs: Inputs) -> tuple[Tensor, Cost | None]:
        attended: Attended = mechanism(inputs.q, inputs.k, inputs.v, Call(source=inputs.source))
        return attended.out, attended.cost

    return attend


def baseline(job: Job) -> Contender:
    """Return PyTorch's own attention."""
    pattern = pattern_of(job)
    return Contender(lambda inputs: (dense(pattern, inputs), None), nn.Identity())
