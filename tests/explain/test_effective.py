"""Effective attention against its definition, row by row, in fp64."""

import pytest
import torch
from torch import Tensor

from thresher.explain.effective import effective_attention


def maps(h: int, n: int, m: int, c: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + m + c)
    values = torch.randn(h, m, c, dtype=torch.float64, generator=generator)
    if rank is not None:
        values = values[..., :rank] @ torch.randn(h, rank, c, dtype=torch.float64, generator=generator)
    return torch.randn(h, n, m, dtype=torch.float64, generator=generator).mul(2).softmax(-1), values


def by_definition(weights: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Solve for the row of least norm on the visible keys that gives the same output."""
    out = torch.zeros_like(weights)
    for h, n in torch.cartesian_prod(*(torch.arange(size) for size in weights.shape[:2])).tolist():
        seen = visible[h, n]
        v = values[h, seen]
        out[h, n, seen] = weights[h, n, seen] @ v @ torch.linalg.pinv(v)
    return out


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("kind", ["all", "causal", "padding"])
def test_it_is_the_row_of_least_norm_with_the_same_output(kind: str, rank: int | None) -> None:
    weights, values = maps(2, 13, 13, 5, rank)
    visible = torch.ones(2, 13, 13, dtype=torch.bool)
    if kind == "causal":
        visible = visible.tril()
    elif kind == "padding":
        visible[..., 9:] = False
    weights = weights * visible
    found = effective_attention(weights, values, None if kind == "all" else visible)
    torch.testing.assert_close(found.weights, by_definition(weights, values, visible), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.weights @ values, weights @ values)
    assert not found.weights[~visible].any()
    assert found.rank == [rank or 5] * 2
    again = effective_attention(found.weights, values, visible)
    torch.testing.assert_close(again.weights, found.weights, rtol=1e-7, atol=1e-9)
    assert float(again.ineffective.max()) < 1e-7
    norms = [torch.linalg.matrix_norm(x) for x in (weights, found.weights)]
    assert (norms[1] < norms[0]).all()
    torch.testing.assert_close(found.ineffective, (1 - (norms[1] / norms[0]).square()).sqrt())


def test_nothing_is_lost_where_values_have_full_rank() -> None:
    weights, values = maps(2, 4, 6, 8)
    found = effective_attention(weights, values)
    torch.testing.assert_close(found.weights, weights, rtol=1e-7, atol=1e-9)
    assert float(found.ineffective.max()) < 1e-7
    assert found.rank == [6, 6]


def test_an_output_projection_of_full_rank_changes_nothing_and_ones_keep_the_sums() -> None:
    weights, values = maps(2, 12, 12, 4)
    projected = values @ torch.randn(2, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        effective_attention(weights, projected).weights, effective_attention(weights, values).weights
    )
    summed = effective_attention(weights, torch.cat([values, torch.ones(2, 12, 1)], -1)).weights
    torch.testing.assert_close(summed.sum(-1), torch.ones(2, 12, dtype=torch.float64))
    torch.testing.assert_close(summed @ values, weights @ values)


def test_what_lies_in_the_null_space_is_all_lost_and_zeros_lose_nothing() -> None:
    weights = torch.tensor([[[0.5, -0.5, 0.0]]])
    values = torch.tensor([[[1.0], [1.0], [1.0]]])
    found = effective_attention(weights, values)
    assert float(found.ineffective) == pytest.approx(1)
    assert effective_attention(torch.zeros(1, 2, 3), torch.zeros(1, 3, 2)).ineffective.tolist() == [0]
