"""Visibility, against the definition written out pair by pair."""

import itertools

import pytest
import torch
from torch import Tensor

from thresher.attention import Call, Pattern
from thresher.attention.shared.visibility import (
    build_pair_mask,
    count_pairs,
    count_visible_keys,
    find_seen_tokens,
    hide_tokens,
)
from thresher.testing.inputs import first, noise_like

CPU = torch.device("cpu")
LENGTHS = [(4, 6), (4, 4), (1, 5)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return noise_like(torch.empty(shape, dtype=torch.float64), seed=seed)


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("parts", list(itertools.product([False, True], repeat=3)), ids=str)
def test_visible_pairs_is_the_conjunction_of_its_parts_pair_by_pair(pattern: Pattern, parts: tuple[bool, ...]) -> None:
    b, h, n, m = 2, 3, 4, 6
    queries, keys = first([4, 2], n), first([5, 3], m).flip(1)
    pairs = randn(b, h, n, m) > 0
    call = Call(
        queries=queries if parts[0] else None, keys=keys if parts[1] else None, pairs=pairs if parts[2] else None
    )
    visible = build_pair_mask(call, pattern, n, m, CPU)
    if visible is None:
        assert not any(parts)
        assert pattern is not Pattern.CAUSAL_SELF
        return
    for x, y, i, j in itertools.product(range(b), range(h), range(n), range(m)):
        wanted = (
            (not parts[0] or queries[x, i])
            and (not parts[1] or keys[x, j])
            and (not parts[2] or pairs[x, y, i, j])
            and (pattern is not Pattern.CAUSAL_SELF or j <= i + m - n)
        )
        assert bool(visible.expand(b, h, n, m)[x, y, i, j]) == bool(wanted)


def test_a_mask_of_pairs_may_be_shared_by_examples_and_heads() -> None:
    pairs = torch.ones(1, 1, 4, 4, dtype=torch.bool).triu()
    visible = build_pair_mask(Call(pairs=pairs, keys=first([4, 3], 4)), Pattern.CAUSAL_SELF, 4, 4, CPU)
    assert visible is not None
    assert torch.equal(visible[0, 0], torch.eye(4).bool())
    assert torch.equal(visible[1, 0], torch.eye(4).bool() & (torch.arange(4) < 3))


@pytest.mark.parametrize("m", [1, 5])
def test_one_query_sees_all_keys_in_causal_attention(m: int) -> None:
    visible = build_pair_mask(Call(), Pattern.CAUSAL_SELF, 1, m, CPU)
    assert visible is None or visible.all()


def test_causal_self_attention_refuses_more_queries_than_keys() -> None:
    with pytest.raises(ValueError, match="3 queries, 2 keys"):
        build_pair_mask(Call(), Pattern.CAUSAL_SELF, 3, 2, CPU)


def calls(n: int, m: int) -> list[Call]:
    queries, keys = first([n - 1, n], n).flip(1), first([m - 1, 2], m).flip(1)
    pairs = randn(2, 3, n, m) > 0.5
    return [
        Call(queries=a, keys=b, pairs=c)
        for a, b, c in itertools.product(
            (None, queries, first([n, 0], n)), (None, keys, first([0, m], m)), (None, pairs)
        )
    ]


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize(("n", "m"), LENGTHS)
def test_tokens_and_counts_agree_with_the_mask(pattern: Pattern, n: int, m: int) -> None:
    for call in calls(n, m):
        mask = build_pair_mask(call, pattern, n, m, CPU)
        mask = torch.ones(2, 3, n, m).bool() if mask is None else mask.expand(2, 3, n, m)
        queries, keys = find_seen_tokens(call, pattern, n, m)
        assert torch.equal(torch.ones(2, 3, n).bool() if queries is None else queries.expand(2, 3, n), mask.any(-1))
        assert torch.equal(torch.ones(2, 3, m).bool() if keys is None else keys.expand(2, 3, m), mask.any(-2))
        assert torch.equal(count_visible_keys(call, pattern, n, m, CPU).expand(2, 3, n), mask.sum(-1))
        ones = torch.ones(2, 3, n, 2), torch.ones(2, 3, m, 2), torch.ones(2, 3, m, 5)
        q, k, v = hide_tokens(*ones, queries, keys)
        assert torch.equal(q[..., 0].bool(), mask.any(-1))
        assert torch.equal(k[..., 0].bool(), mask.any(-2))
        assert torch.equal(v[..., 0].bool(), mask.any(-2))


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize(("n", "m"), LENGTHS)
def test_rows_of_a_mask_are_those_of_the_whole(pattern: Pattern, n: int, m: int) -> None:
    for call in calls(n, m):
        whole = build_pair_mask(call, pattern, n, m, CPU)
        for start, stop in itertools.combinations(range(n + 1), 2):
            part = build_pair_mask(call, pattern, n, m, CPU, range(start, stop))
            if whole is None or part is None:
                assert whole is part
            else:
                assert torch.equal(part.expand(2, 3, stop - start, m), whole.expand(2, 3, n, m)[:, :, start:stop])


@pytest.mark.parametrize("shape", [(1, 1, 3, 4), (2, 1, 1, 4), (1, 3, 3, 4), (2, 3, 3, 4), (2, 1, 3, 1)])
def test_pairs_are_counted_for_every_example_and_head(shape: tuple[int, ...]) -> None:
    pairs = randn(*shape) > 0
    assert torch.equal(count_pairs(pairs, (2, 3, 3, 4), pairs.device), pairs.expand(2, 3, 3, 4).sum((2, 3)).float())


def test_no_mask_counts_every_pair() -> None:
    assert torch.equal(count_pairs(None, (2, 3, 5, 4), torch.device("cpu")), torch.full((2, 3), 20.0))
