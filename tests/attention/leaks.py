"""What a mechanism may not depend on: hidden tokens, the future, its neighbours, other calls, undeclared seeds.

They perturb values and compare results: gradients cannot see a leak through sorting or rounding. Each takes a built
mechanism, any at all, and raises AssertionError if it leaks: `check_examples_are_independent(Mine(2, 8, pattern))`.
"""

import copy
import itertools
from dataclasses import replace

import torch
from torch import Tensor

from tests.attention.helpers import (
    MILD,
    SHARP,
    attend,
    disturb,
    draw,
    first,
    gradients,
    last,
    lengths_of,
    masks,
    masks_that_empty_rows,
    noise_like,
    padded,
    same,
    visible_by_definition,
)
from thresher.attention import Call, Mechanism, Pattern

NAN = float("nan")


def check_hidden_tokens_change_nothing(mechanism: Mechanism) -> None:
    """Content of hidden tokens, nan included, changes neither output, cost nor any gradient by a bit."""
    for call in masks(mechanism):
        (b, h, n, _), m = draw(mechanism).q.shape, lengths_of(mechanism.pattern)[1]
        queries, keys = torch.zeros(b, h, n, dtype=torch.bool), torch.zeros(b, h, m, dtype=torch.bool)
        if call.queries is not None:
            queries = queries | ~call.queries[:, None]
        if call.keys is not None:
            keys = keys | ~call.keys[:, None]
        if call.pairs is not None:
            queries, keys = queries | ~call.pairs.any(-1), keys | ~call.pairs.any(-2)
        _assert_inert(mechanism, call, queries, keys)


def check_masks_hide_together(mechanism: Mechanism) -> None:
    """A token that only the conjunction of padding, pairs and causality hides, is as hidden as any other."""
    n, m = lengths_of(mechanism.pattern)
    only_last_sees_last = torch.ones(2, 1, n, m, dtype=torch.bool)
    only_last_sees_last[..., : n - 1, m - 1] = False
    second_sees_only_last = torch.ones(2, 1, n, m, dtype=torch.bool)
    second_sees_only_last[..., 1, : m - 1] = False
    calls = [
        Call(queries=first([n - 1, n - 1], n), pairs=only_last_sees_last),
        Call(keys=first([m - 1, m - 1], m), pairs=second_sees_only_last),
    ]
    if mechanism.pattern is Pattern.CAUSAL_SELF:
        last_pair = torch.ones(2, 1, n, m, dtype=torch.bool)
        last_pair[..., n - 1, m - 1] = False
        calls += [Call(pairs=last_pair), Call(queries=first([n - 1, n - 3], n)), Call(keys=last([m - 1, m - 3], m))]
    for call in calls:
        visible = visible_by_definition(mechanism, draw(mechanism), call)
        _assert_inert(mechanism, call, ~visible.any(-1), ~visible.any(-2))


def check_hidden_tokens_get_nothing(mechanism: Mechanism) -> None:
    """Rows of hidden queries and rows that see no key are zero; neither they nor hidden keys get a gradient."""
    for call in (*masks(mechanism), *masks_that_empty_rows(mechanism)):
        for training in (True, False):
            mechanism.train(training)
            inputs = draw(mechanism, spread=SHARP)
            visible = visible_by_definition(mechanism, inputs, call)
            attended, found = gradients(mechanism, inputs, call)
            assert (attended.out[~visible.any(-1)] == 0).all(), "a row without a key is not zero"
            for name, hidden in (("q", ~visible.any(-1)), ("k", ~visible.any(-2)), ("v", ~visible.any(-2))):
                if (gradient := found.get(name)) is not None:
                    assert (gradient[hidden] == 0).all(), f"a hidden token has a gradient in {name}"
            for name, gradient in found.items():
                assert gradient is None or gradient.isfinite().all(), f"empty rows spoil the gradient of {name}"


def check_rows_ignore_what_follows(mechanism: Mechanism) -> None:
    """Changing everything of its own sequence after row t leaves rows up to t alone, bit for bit."""
    assert mechanism.pattern.causal, "only causal mechanisms promise this"
    inputs = draw(mechanism, spread=SHARP)
    (b, h, n, _), (hk, m) = inputs.q.shape, inputs.k.shape[1:3]
    bias = noise_like(torch.empty(1, h, n, m, dtype=torch.float64))
    calls = [(Call(), range(n - 1)), (padded(mechanism.pattern), (0, n // 2)), (Call(bias=bias), (0, n // 2))]
    for (call, rows), training in itertools.product(calls, (True, False)):
        mechanism.train(training)
        before = attend(mechanism, inputs, call).out
        for t, size in itertools.product(rows, (3.0, 100.0)):
            queries = (torch.arange(n) > t).expand(b, h, n)
            keys = ((torch.arange(m) > t) & (not mechanism.pattern.cross)).expand(b, hk, m)
            after = attend(mechanism, disturb(inputs, queries, keys, size), call).out
            assert torch.equal(before[:, :, : t + 1], after[:, :, : t + 1]), f"row {t} or less sees the future"


def check_examples_are_independent(mechanism: Mechanism) -> None:
    """Changing one example, its padding included, leaves the others alone, bit for bit."""
    one = torch.tensor([False, True, False])[:, None, None]
    for training in (True, False):
        mechanism.train(training)
        inputs = draw(mechanism, batch=3, spread=SHARP)
        queries, keys = one.expand(inputs.q.shape[:3]), one.expand(inputs.k.shape[:3])
        for call in (Call(), padded(mechanism.pattern, batch=3)):
            other = call
            if call.queries is not None and call.keys is not None:
                other = Call(queries=call.queries.clone(), keys=call.keys.clone())
                other.queries[1], other.keys[1] = True, True  # type: ignore[index]
            before = attend(mechanism, inputs, call)
            for size in (NAN, 0.0, 100.0):
                after = attend(mechanism, disturb(inputs, queries, keys, size), other)
                for old, new in zip((before.out, *before.cost), (after.out, *after.cost), strict=True):
                    assert torch.equal(old[[0, 2]], new[[0, 2]]), "an example depends on its neighbour"


def check_queries_are_independent(mechanism: Mechanism) -> None:
    """Changing one query leaves the other rows alone, but for noncausal mechanisms that say that they rank queries."""
    changed = False
    for seed, spread in itertools.product(range(4), (MILD, SHARP)):
        inputs = draw(mechanism, spread=spread, seed=seed)
        (b, h, n, _), keys = inputs.q.shape, torch.zeros(inputs.k.shape[:3], dtype=torch.bool)
        after = disturb(inputs, (torch.arange(n) == n // 2).expand(b, h, n), keys, 100.0)
        others = torch.arange(n) != n // 2
        for training in (True, False):
            mechanism.train(training)
            old, new = (attend(mechanism, x).out[:, :, others] for x in (inputs, after))
            changed |= not torch.equal(old, new)
    may = mechanism.ranks_queries and not mechanism.pattern.causal
    assert may or not changed, "a row depends on the queries of others"
    assert changed or not may, "queries are declared to be ranked, and are not"


def check_content_is_ignored(mechanism: Mechanism) -> None:
    """A mechanism that declares itself not content based gives the same output and cost for any queries and keys."""
    assert not mechanism.content_based, "only mechanisms that ignore content promise this"
    inputs = draw(mechanism)
    for training in (True, False):
        mechanism.train(training)
        before = attend(mechanism, inputs)
        after = attend(mechanism, replace(inputs, q=noise_like(inputs.q, 9.0), k=noise_like(inputs.k, 9.0, seed=8)))
        assert same(before, after), "queries or keys have an influence"


def check_calls_leave_nothing_behind(mechanism: Mechanism) -> None:
    """A call changes neither its inputs nor the mechanism: repeated after another one, it gives the same."""
    inputs, other = draw(mechanism, spread=SHARP), draw(mechanism, batch=1, spread=MILD, seed=5)
    originals = {name: x.clone() for name, x in inputs.leaves().items()}
    for training in (True, False):
        mechanism.train(training)
        state = copy.deepcopy(mechanism.state_dict())
        before = attend(mechanism, inputs)
        for name, x in inputs.leaves().items():
            assert torch.equal(originals[name], x), f"a call overwrites {name}"
        assert all(torch.equal(state[name], x) for name, x in mechanism.state_dict().items()), (
            "a call changes the state"
        )
        attend(mechanism, other)
        assert same(before, attend(mechanism, inputs)), "a call depends on the one before"


def check_randomness_is_declared(mechanism: Mechanism) -> None:
    """A seed fixes the output; another seed changes it iff the mechanism is stochastic; evaluation is always fixed."""
    inputs = draw(mechanism, spread=SHARP)
    mechanism.train()
    before, again, other = (attend(mechanism, inputs, seed=seed) for seed in (0, 0, 1))
    assert same(before, again), "the same seed gives another result"
    changed = not torch.equal(before.out, other.out)
    assert changed == mechanism.stochastic, (
        f"stochastic is {mechanism.stochastic}, but seeds {'do' * changed or 'do not'} matter"
    )
    mechanism.eval()
    before, other = (attend(mechanism, inputs, seed=seed) for seed in (0, 1))
    assert same(before, other), "evaluation is not reproducible"
    state = torch.get_rng_state()
    mechanism(inputs.q, inputs.k, inputs.v, Call(source=inputs.source))
    assert torch.equal(state, torch.get_rng_state()), "evaluation draws from the global generator"


def _assert_inert(mechanism: Mechanism, call: Call, queries: Tensor, keys: Tensor) -> None:
    assert queries.any() or keys.any(), "this call hides nothing"
    inputs = draw(mechanism, spread=SHARP)
    for training in (True, False):
        mechanism.train(training)
        before, gradients_before = gradients(mechanism, inputs, call)
        for size in (NAN, 3.0, 1e4):
            after, gradients_after = gradients(mechanism, disturb(inputs, queries, keys, size), call)
            assert torch.equal(before.out, after.out), f"hidden tokens of size {size} change the output"
            for name, old, new in zip(before.cost._fields, before.cost, after.cost, strict=True):
                assert torch.equal(old, new), f"hidden tokens of size {size} change cost.{name}"
            for name, old in gradients_before.items():
                new = gradients_after[name]
                # A projection of nan has a gradient of nan, whoever uses its result.
                if old is not None and new is not None and name not in ("x", "weight"):
                    assert torch.equal(old, new), f"hidden tokens of size {size} change the gradient of {name}"
