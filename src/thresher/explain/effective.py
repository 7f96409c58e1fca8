"""Effective attention: the part of an attention map that can reach the output (Brunner et al., arXiv 1908.04211).

With fewer features than keys, values V [m, c] have a left null space: rows a with a V = 0. That part of a map does not
reach the output, so maps that differ only there give the same output ("On Explaining with Attention Matrices", arXiv
2410.18541). Effective attention is the map with this part projected off,

    A_eff = A V V^+,    A_eff V = A V,    and of all such maps the one of least norm.

A query uses its visible keys only; its row is projected with their values, so nothing moves to a hidden key. The result
is not a distribution: it may be negative, and the sums of rows may change.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BLOCK = 256  # rows at a time


class Effective(NamedTuple):
    """Effective attention and the share of the map that it leaves out.

    Attributes:
        weights: A_eff, in fp64.
        ineffective: |A - A_eff| / |A|, Frobenius norms by head, 0 to 1.
        rank: Largest rank of the values that a query sees, by head.
    """

    weights: Float[Tensor, "h n m"]
    ineffective: Float[Tensor, " h"]
    rank: list[int]


@torch.no_grad()
def effective_attention(
    weights: Float[Tensor, "h n m"],
    values: Float[Tensor, "h m c"],
    visible: Bool[Tensor, "h n m"] | None = None,
    rtol: float | None = None,
) -> Effective:
    """Project the left null space of the values off an attention map.

    Values may be those of heads, V, or their output projections, V W_O; the result is the same if W_O has full rank.
    An extra column of ones preserves the sums of rows.

    Args:
        weights: Attention maps A by head, zero where hidden.
        values: Values that each head sums.
        visible: Visible keys of each query; all by default.
        rtol: Singular values below this share of the largest count as zero; by default the rounding error of fp32
            times the larger dimension of the values, at least 1e-6 (Gram matrices resolve no less).
    """
    a, v = weights.double(), values.double()
    rtol = max(1e-6, torch.finfo(torch.float32).eps * max(v.shape[1:])) if rtol is None else rtol
    done, ranks = [], []
    for head in range(len(a)):
        seen = a.new_ones(1, a.shape[2], dtype=torch.bool) if visible is None else visible[head]
        seen, group = (
            torch.unique(seen, dim=0, return_inverse=True) if len(seen) > 1 else (seen, seen.new_zeros(1).long())
        )
        inverses, rank = _invert(v[head], seen, rtol)
        group = group.expand(len(a[head])) if len(group) == 1 else group
        sums = a[head] @ v[head]  # what reaches the output
        rows = torch.empty_like(a[head])
        for start in range(0, len(rows), BLOCK):
            some = slice(start, start + BLOCK)
            inner = torch.einsum("nc,ncd->nd", sums[some], inverses[group[some]])
            rows[some] = (inner @ v[head].mT) * seen[group[some]]
        done.append(rows)
        ranks.append(rank)
    effective = torch.stack(done)
    norm = torch.linalg.matrix_norm(a)
    lost = torch.linalg.matrix_norm(a - effective) / norm.masked_fill(norm == 0, 1)
    return Effective(effective, lost, ranks)


def _invert(v: Float[Tensor, "m c"], seen: Bool[Tensor, "g m"], rtol: float) -> tuple[Float[Tensor, "g c c"], int]:
    """Compute the pseudo-inverse of V^T V over the keys of each group of queries, and the largest rank."""
    inverses, rank = [], 0
    for some in seen.split(BLOCK):
        gram = torch.einsum("gm,mc,md->gcd", some.to(v.dtype), v, v)
        size, axes = torch.linalg.eigh(gram)
        real = size > (rtol**2 * size[:, -1:]).clamp_min(torch.finfo(v.dtype).tiny)
        rank = max(rank, int(real.sum(-1).max()))
        inverse = torch.where(real, 1 / torch.where(real, size, 1), 0)
        inverses.append((axes * inverse[:, None]) @ axes.mT)
    return torch.cat(inverses), rank
