"""Gradient checkpointing computes a mechanism again in backward: gradients are those without it, of the same draws."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tests.attention.test_contract import CELLS, Cell
from thresher.attention import Attended, Call, Mechanism, Pattern, ValueSource
from thresher.attention.latte.mechanism import Latte
from thresher.testing.inputs import draw, noise_like, padded

# Settings with an autograd function or an operator of their own, which the defaults do not reach.
VARIANTS: dict[str, list[dict[str, object]]] = {
    "latte": [
        {"threshold": 0.5},
        {"gate": {"surrogate": "inside"}, "threshold": 0.5},
        {"gate": {"surrogate": "compact"}, "threshold": 0.5},
        {"gate": {"mode": "soft", "surrogate": "sigmoid"}},
    ],
    "latte-reference": [{"gate": {"surrogate": "inside"}, "threshold": 0.5}],
    "topk": [{"keys": 2}],
    "smyrf": [{"cluster": 3}],
    "smyrf-reference": [{"cluster": 3}, {"cluster": 3, "dedup": "count"}],
    "yoso": [{"conv": 3}, {"grad": "exact"}],
    "yoso-reference": [{"dense_below": 0}],
    "mca": [{"sampling": {"draws": "shared"}}, {"path": "gather", "sampling": {"draws": "shared"}}],
}
PATTERNS = (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF)  # cross attention takes the same ways
CASES = [
    (cell, settings)
    for cell in CELLS
    if cell.pattern is next(p for p in PATTERNS if p in cell.cls.supports)
    for settings in [{}, *VARIANTS.get(cell.name, [])]
]


def trained(mechanism: Mechanism, run: Callable[..., tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Return outputs, costs and the gradients of both to inputs and parameters, after one training step."""
    inputs = draw(mechanism, lengths=(9, 9), spread=2.0)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.leaves().items()}
    made = inputs.with_leaves(leaves)
    mechanism.zero_grad()
    torch.manual_seed(3)
    source = (made.source.x, made.source.weight) if made.source else ()
    out, *cost = run(made.q, made.k, made.v, *source)
    total = (out * noise_like(out)).sum() + 0.1 * sum(part.sum() for part in cost if part.requires_grad)
    torch.rand(5)  # whatever draws between forward and backward
    total.backward()
    grads = {name: x.grad for name, x in (leaves | dict(mechanism.named_parameters())).items()}
    return {"out": out, **{name: x for name, x in grads.items() if x is not None}}


def forward(mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, *source: Tensor) -> tuple[Tensor, ...]:
    call = padded(mechanism.pattern, lengths=(9, 9))
    values = ValueSource(*source, None) if source else None
    attended: Attended = mechanism(q, k, v, Call(queries=call.queries, keys=call.keys, source=values))
    return attended.out, *attended.cost


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("cell", "settings"), CASES, ids=str)
def test_gradients_are_those_without(cell: Cell, settings: dict[str, object], use_reentrant: bool) -> None:
    mechanism = cell.build(**settings).train()
    mechanism.dropout = 0.3 if mechanism.drops_weights and not settings else 0.0
    plain = trained(mechanism, partial(forward, mechanism))
    again = trained(mechanism, partial(checkpoint, partial(forward, mechanism), use_reentrant=use_reentrant))
    assert plain.keys() == again.keys()
    assert set("qk") <= plain.keys() or not mechanism.content_based
    for name, x in plain.items():
        # Without gradients LATTE's kernel serves what PyTorch serves with them: equal up to rounding.
        assert_close(again[name], x, atol=1e-10, rtol=1e-6 if "threshold" in name else 1e-10, msg=name)


def test_a_stochastic_mechanism_draws_anew_in_the_next_step() -> None:
    """The draws above are replayed, not fixed."""
    for name in ("smyrf", "yoso", "mca"):
        mechanism = next(c for c in CELLS if c.name == name).build(**VARIANTS[name][0]).train()
        inputs = draw(mechanism, lengths=(9, 9))
        call = Call(source=inputs.source)
        first, second = (mechanism(inputs.q, inputs.k, inputs.v, call).out for _ in range(2))
        assert not torch.equal(first, second)


def test_the_kernel_serves_a_checkpointed_call() -> None:
    mechanism = Latte(2, 8, Pattern.CAUSAL_SELF, threshold=0.5, gate={"surrogate": "inside"}, backend="cpu").train()
    for use_reentrant in (False, True):
        found = trained(mechanism, partial(checkpoint, partial(forward, mechanism), use_reentrant=use_reentrant))
        assert found["thresholds.offset"].all()
