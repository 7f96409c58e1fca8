"""MCA on CPUs: a kernel projects values from drawn features, PyTorch computes the attention weights."""

from functools import partial

import torch
from torch import Tensor

from thresher.attention.backends import Implementation, explain_unreadable
from thresher.attention.contract import Attended, ValueSource
from thresher.attention.mca import kernel
from thresher.attention.mca.mechanism import Mca, compute_chances
from thresher.attention.prepared import Prepared


class McaOnCpu(Implementation[Mca]):
    """The kernel `mca`, forward and backward."""

    kernel = "mca"

    def explain_refusal(self, mechanism: Mca, x: Prepared) -> str | None:
        if mechanism.alpha == 0:
            return None  # dense attention, which needs no kernel
        if mechanism.sampling.distribution == "poisson":
            return "it has no Poisson sampling"
        if mechanism.sampling.draws != "token":
            return "it has no draws that tokens share"
        assert x.call.source is not None
        return explain_unreadable((x.call.source.x, x.call.source.weight), self.device)

    def run(self, mechanism: Mca, x: Prepared) -> Attended:
        if mechanism.alpha == 0:
            x.widen()
            return mechanism.reference(x)
        return mechanism.attend(x, partial(project, mechanism))


def project(mechanism: Mca, source: ValueSource, counts: Tensor) -> Tensor:
    """Project tokens to values [b, g, m, dv] without bias, each from `counts` drawn features."""
    d = source.x.shape[-1]
    weight = source.weight.unflatten(0, (counts.shape[1], -1))
    chances = compute_chances(weight.detach())
    exact = counts >= d
    uniform = mechanism.draw_uniform(chances, counts, d, mechanism.build_generator(chances))
    drawn = counts.masked_fill(exact, 0).to(source.x.dtype)
    values = kernel.encode(
        x=source.x,
        rows=weight.mT,
        chances=chances,
        cumulated=chances.cumsum(-1),
        uniform=uniform,
        counts=drawn,
    )
    return torch.where(exact[..., None], source.x[:, None] @ weight.mT, values)
