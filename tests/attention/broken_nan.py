"""Mechanisms that hide, spread or count what is no finite number."""

import torch
from torch import Tensor

from tests.attention.broken import Seen, breaks_cost, breaks_output
from thresher.attention import Cost


@breaks_output
def hides_nan(s: Seen) -> Tensor:
    return s.out.nan_to_num()


@breaks_output
def nan_for_all(s: Seen) -> Tensor:
    return s.out + s.q.mul(0).sum((1, 2, 3), keepdim=True)


@breaks_output
def shrinks_with_nan(s: Seen) -> Tensor:
    return torch.where(s.q.isfinite().all(), s.out, s.out / 2)


@breaks_cost
def counts_nan(s: Seen) -> Cost:
    return s.cost._replace(select=s.cost.select + s.q.mul(0).sum((2, 3)).to(s.cost.select.dtype))
