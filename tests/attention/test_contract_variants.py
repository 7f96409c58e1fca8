"""The contract at other settings than the defaults: the paths that short inputs or defaults do not reach."""

from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from tests.attention import checks, leaks
from tests.attention.helpers import Inputs, configured, draw, gradients, noise_like, padded
from thresher.attention import Call, Mechanism, Pattern, find

VARIANTS: list[tuple[str, dict[str, object]]] = [
    ("latte", {"theta": 0.4, "surrogate": "compact"}),
    ("topk", {"chunk": 2}),
    ("topk", {"keys": 2, "chunk": 3}),
    ("smyrf", {"cluster": 3, "rounds": 3, "dedup": "count"}),
    ("smyrf", {"cluster": 3, "quantise": True, "width": 1.0}),
    ("yoso", {"dense_below": 0, "bits": 3}),
    ("yoso", {"dense_below": 0, "bits": 3, "hash": "hadamard", "grad": "exact"}),
    ("yoso", {"expectation": True, "grad": "exact"}),
    ("mca", {"grad": "exact", "draws": "shared"}),
    ("mca", {"path": "gather", "draws": "shared"}),
    ("mca", {"sampler": "poisson"}),
    ("mca", {"reproduce_paper": True}),
]
CELLS = [(name, variant, p) for name, variant in VARIANTS for p in Pattern if p in find(name).supports]
CHECKS = [
    checks.check_shapes_and_costs,
    checks.check_sizes,
    leaks.check_hidden_tokens_change_nothing,
    leaks.check_masks_hide_together,
    leaks.check_hidden_tokens_get_nothing,
    leaks.check_calls_leave_nothing_behind,
    checks.check_any_float_type,
]


def build(name: str, variant: dict[str, object], pattern: Pattern) -> Mechanism:
    torch.manual_seed(0)
    return find(name)(2, 8, pattern, **variant)  # type: ignore[arg-type]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("name", "variant", "pattern"), CELLS, ids=str)
def test_the_contract_holds_at(
    name: str, variant: dict[str, object], pattern: Pattern, check: Callable[[Mechanism], None]
) -> None:
    check(build(name, variant, pattern))


@pytest.mark.parametrize(("name", "variant", "pattern"), [c for c in CELLS if c[2].causal], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_rows_ignore_what_follows_at(name: str, variant: dict[str, object], pattern: Pattern, dropout: float) -> None:
    mechanism = build(name, variant, pattern)
    if mechanism.drops_weights or not dropout:
        mechanism.dropout = dropout
        leaks.check_rows_ignore_what_follows(mechanism)


# An example gathered with others goes through a product of another shape, and is equal up to rounding only.
INDEPENDENT = [c for c in CELLS if c[1].get("path") != "gather"]


@pytest.mark.parametrize(("name", "variant", "pattern"), INDEPENDENT, ids=str)
def test_examples_are_independent_at(name: str, variant: dict[str, object], pattern: Pattern) -> None:
    leaks.check_examples_are_independent(build(name, variant, pattern))


@pytest.mark.parametrize("name", configured())
@pytest.mark.parametrize("pattern", Pattern)
def test_shared_key_heads_are_what_repeated_ones_compute(name: str, pattern: Pattern) -> None:
    """Grouped-query attention, forward and backward; MCA samples shared values once, so it is another function."""
    cls = find(name)
    if pattern not in cls.supports or cls.needs_source:
        return
    torch.manual_seed(0)
    mechanism = cls(4, 8, pattern).eval()
    grouped = draw(mechanism, groups=2, lengths=(9, 9))
    repeated = Inputs(grouped.q, grouped.k.repeat_interleave(2, 1), grouped.v.repeat_interleave(2, 1))
    bias = noise_like(torch.empty(1, 4, 9, 9, dtype=torch.float64))
    for call in (Call(), padded(pattern, lengths=(9, 9)), Call(bias=bias)):
        (one, found), (other, wanted) = (gradients(mechanism, inputs, call, cost=0) for inputs in (grouped, repeated))
        assert_close(one.out, other.out, atol=1e-12, rtol=1e-12)
        for leaf in ("k", "v"):
            if wanted[leaf] is not None:
                assert_close(found[leaf], wanted[leaf].unflatten(1, (2, 2)).sum(2), atol=1e-12, rtol=1e-12)  # type: ignore[union-attr]


def test_mca_near_its_dense_limit_is_softmax_attention_on_its_own_path() -> None:
    for pattern in (Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS):
        near = find("mca")(4, 8, pattern, alpha=1e-6)  # type: ignore[call-arg]
        checks.check_dense_limit(near)
        checks.check_low_precision(near)
