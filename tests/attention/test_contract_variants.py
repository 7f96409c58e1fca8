"""The contract at other settings than the defaults: the paths that short inputs or defaults do not reach."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.testing import assert_close

from tests.attention.cases import name_case
from tests.attention.configured import configured
from tests.shapes import OF_SHAPES, without_shape_checks
from thresher.attention import Call, Mechanism, Pattern, find
from thresher.testing import checks, leaks
from thresher.testing.inputs import Inputs, draw, gradients, noise_like, padded

EXACT: dict[str, object] = {"estimate": {"bits": "exact"}}
VARIANTS: list[tuple[str, dict[str, object]]] = [
    ("latte", {"threshold": 0.4, "gate": {"surrogate": "compact"}}),
    ("topk", {"chunk": 2}),
    ("topk", {"keys": 2, "chunk": 3}),
    ("topk", {"keys": 2, "chunk": 3, "tail": "mean"}),
    ("latte", {"threshold": 0.4, "tail": "mean"}),
    ("latte", {"threshold": 0.4, "tail": "mean", "unit": "nats", "gate": {"surrogate": "sigmoid", "mode": "soft"}}),
    ("blocks", {"threshold": 0.4, "block": {"queries": 3, "keys": 2}}),
    (
        "blocks",
        {
            **EXACT,
            "block": {"queries": 3, "keys": 2, "rank": "pooled", "top": 2},
            "gate": {"mode": "hard"},
            "backend": "reference",  # gathered sums are as long as the longest list, and round accordingly
        },
    ),
    ("blocks", {**EXACT, "block": {"queries": 3, "keys": 2, "rank": "learned"}, "threshold": 0.4}),
    ("smyrf", {"cluster": 3, "rounds": 3, "dedup": "count"}),
    ("smyrf", {"cluster": 3, "quantise": True, "width": 1.0}),
    ("smyrf", {"cluster": 3, "rounds": 2, "tail": "mean"}),
    ("yoso", {"dense_below": 0, "hash": {"bits": 3}}),
    ("yoso", {"dense_below": 0, "hash": {"bits": 3, "kind": "hadamard"}, "grad": "exact"}),
    ("yoso", {"expectation": True, "grad": "exact"}),
    ("mca", {"grad": "exact", "sampling": {"draws": "shared"}}),
    ("mca", {"path": "gather", "sampling": {"draws": "shared"}}),
    ("mca", {"sampling": {"distribution": "poisson"}}),
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
    checks.check_nan_in_is_nan_out,
]


def build(name: str, variant: dict[str, object], pattern: Pattern) -> Mechanism:
    torch.manual_seed(0)
    return find(name)(2, 8, pattern, **variant)  # type: ignore[arg-type]


def pair_up() -> Iterator[tuple[str, dict[str, object], Pattern, Callable[[Mechanism], None]]]:
    """Yield each variant with each check, in patterns that take turns: any two of the three meet."""
    for i, (name, variant) in enumerate(VARIANTS):
        patterns = [p for p in Pattern if p in find(name).supports]
        for j, check in enumerate(CHECKS):
            yield name, variant, patterns[(i + j) % len(patterns)], check


@pytest.mark.parametrize(("name", "variant", "pattern", "check"), list(pair_up()), ids=name_case)
def test_the_contract_holds_at(
    name: str, variant: dict[str, object], pattern: Pattern, check: Callable[[Mechanism], None]
) -> None:
    with without_shape_checks(check not in OF_SHAPES):
        check(build(name, variant, pattern))


def test_each_variant_meets_each_check_and_each_pattern_each_check() -> None:
    pairs = list(pair_up())
    checked = {(str(variant), check) for _, variant, _, check in pairs}
    assert checked == {(str(variant), check) for _, variant in VARIANTS for check in CHECKS}
    assert {(p, check) for _, _, p, check in pairs} == {(p, check) for p in Pattern for check in CHECKS}
    assert {(str(variant), p) for _, variant, p, _ in pairs} == {(str(variant), p) for _, variant, p in CELLS}


CAUSAL = [c for c in CELLS if c[2].causal]
DROPPING = [(*c, 0.4) for c in CAUSAL if find(c[0]).drops_weights]


@pytest.mark.parametrize(("name", "variant", "pattern", "dropout"), [*((*c, 0.0) for c in CAUSAL), *DROPPING], ids=str)
def test_rows_ignore_what_follows_at(name: str, variant: dict[str, object], pattern: Pattern, dropout: float) -> None:
    mechanism = build(name, variant, pattern)
    mechanism.dropout = dropout
    leaks.check_rows_ignore_what_follows(mechanism)


# An example gathered with others goes through a product of another shape, and is equal up to rounding only.
INDEPENDENT = [c for c in CELLS if c[1].get("path") != "gather"]


@pytest.mark.parametrize(("name", "variant", "pattern"), INDEPENDENT, ids=str)
def test_examples_are_independent_at(name: str, variant: dict[str, object], pattern: Pattern) -> None:
    leaks.check_examples_are_independent(build(name, variant, pattern))


# MCA samples shared values once, so it is another function there.
SHARING = [
    (name, p) for name in configured() if not find(name).needs_source for p in Pattern if p in find(name).supports
]


@pytest.mark.parametrize(("name", "pattern"), SHARING, ids=str)
def test_shared_key_heads_are_what_repeated_ones_compute(name: str, pattern: Pattern) -> None:
    """Grouped-query attention, forward and backward."""
    torch.manual_seed(0)
    mechanism = find(name)(4, 8, pattern).eval()
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
