"""Check for leaks from hidden tokens, the future, other examples, other calls and undeclared seeds.

The checks perturb values and compare results, because gradients do not show leaks through sorting or rounding. Each
takes any built mechanism and raises AssertionError if it leaks: `check_examples_are_independent(Mine(2, 8, pattern))`.
"""

import copy
import itertools
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from thresher.attention import Call, Mechanism, Pattern
from thresher.testing.inputs import (
    MILD,
    SHARP,
    attend,
    choose_lengths,
    disturb,
    draw,
    first,
    generate_masks_with_empty_rows,
    gradients,
    last,
    list_results,
    masks,
    noise_like,
    padded,
    same,
    visible_by_definition,
)

NAN = float("nan")


def check_hidden_tokens_change_nothing(mechanism: Mechanism) -> None:
    """Check that the content of hidden tokens, NaN included, changes no bit of output, cost and gradients."""
    for call in masks(mechanism):
        (b, h, n, _), m = draw(mechanism).q.shape, choose_lengths(mechanism.pattern)[1]
        queries, keys = torch.zeros(b, h, n, dtype=torch.bool), torch.zeros(b, h, m, dtype=torch.bool)
        if call.queries is not None:
            queries = queries | ~call.queries[:, None]
        if call.keys is not None:
            keys = keys | ~call.keys[:, None]
        if call.pairs is not None:
            queries, keys = queries | ~call.pairs.any(-1), keys | ~call.pairs.any(-2)
        _assert_inert(mechanism, call, queries, keys)


def check_masks_hide_together(mechanism: Mechanism) -> None:
    """Check tokens that only padding, pairs and causality together hide; they must be as hidden as others."""
    n, m = choose_lengths(mechanism.pattern)
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
    """Check that rows of hidden queries and rows without a key are zero, and hidden tokens get no gradient."""
    for call in (*masks(mechanism), *generate_masks_with_empty_rows(mechanism)):
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
    """Check that changes after row t of the query sequence leave rows up to t unchanged, bit for bit."""
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
    """Check that a change of one example, padding included, leaves the others unchanged, bit for bit."""
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
                found = list_results(after)
                for name, old in list_results(before).items():
                    assert torch.equal(old[[0, 2]], found[name][[0, 2]]), "an example depends on another one"


def check_queries_are_independent(mechanism: Mechanism) -> None:
    """Check that a change of one query leaves other rows unchanged, unless `ranks_queries` declares otherwise."""
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
    assert may or not changed, "a row depends on the queries of other rows"
    assert changed or not may, "queries are declared to be ranked, and are not"


def check_pooling_is_declared(mechanism: Mechanism) -> None:
    """Check that a causal mask of pairs hides the future in a noncausal pattern, unless `pools_tokens` is declared."""
    assert mechanism.pattern is Pattern.NONCAUSAL_SELF, "this check is for noncausal self attention"
    mechanism.eval()
    moved = False
    for seed, spread in itertools.product(range(4), (MILD, SHARP)):
        inputs = draw(mechanism, spread=spread, seed=seed)
        (b, h, n, _), hk = inputs.q.shape, inputs.k.shape[1]
        call = Call(pairs=torch.ones(1, 1, n, n, dtype=torch.bool).tril())
        later = torch.arange(n) >= n // 2
        after = disturb(inputs, later.expand(b, h, n), later.expand(b, hk, n), 100.0)
        old, new = (attend(mechanism, x, call).out[:, :, : n // 2] for x in (inputs, after))
        moved |= not torch.equal(old, new)
    assert mechanism.pools_tokens or not moved, "a row depends on tokens that a mask of pairs hides from it"
    assert moved or not mechanism.pools_tokens, "tokens are declared to be pooled, and are not"


def check_sliding_is_declared(mechanism: Mechanism) -> None:
    """Check that a cache may drop keys outside a sliding window, unless `slides` is declared False."""
    assert mechanism.pattern is Pattern.CAUSAL_SELF, "this check is for causal self attention"
    mechanism.eval()
    n, moved = 24, False
    for seed, window in itertools.product(range(2), (5, 6, 7, 8)):
        inputs = draw(mechanism, lengths=(n, n), spread=SHARP, seed=seed)
        pairs = torch.ones(1, 1, n, n, dtype=torch.bool).tril().triu(1 - window)
        whole = attend(mechanism, inputs, Call(pairs=pairs, whole_mask=True)).out[:, :, -1:]
        alone = mechanism(inputs.q[:, :, -1:], inputs.k[:, :, -window:], inputs.v[:, :, -window:], Call()).out
        moved |= not torch.allclose(alone, whole, atol=1e-9, rtol=1e-9)
    assert not (mechanism.slides and moved), "a row depends on keys that its window hides"
    assert mechanism.slides or moved, "it declares slides=False, but slides"


def check_whole_masks_are_followed(mechanism: Mechanism) -> None:
    """Check that causal self attention follows a whole mask exactly, or refuses it."""
    assert mechanism.pattern is Pattern.CAUSAL_SELF, "this check is for causal self attention"
    inputs = draw(mechanism, spread=SHARP)
    (b, h, n, _), hk = inputs.q.shape, inputs.k.shape[1]
    past = (noise_like(torch.empty(b, 1, n, n)) > -0.5).tril() | torch.eye(n, dtype=torch.bool)
    by_rule, whole = (attend(mechanism, inputs, Call(pairs=past, whole_mask=all)) for all in (False, True))
    assert same(by_rule, whole), "a whole mask of the past gives another result"
    prefix = torch.ones(b, 1, n, n, dtype=torch.bool).tril()
    prefix[..., :4, :4] = True
    call = Call(pairs=prefix, whole_mask=True)
    before = None
    with suppress(ValueError):  # a refusal; tests of hosts cover it
        before = attend(mechanism, inputs, call)
    if before is None:
        return
    assert torch.equal(before.cost.visible, prefix.sum((-2, -1)).expand(b, h).float()), (
        "the mask does not decide what is visible"
    )
    for t in (3, 4):
        changed = torch.arange(n) == t
        after = attend(mechanism, disturb(inputs, changed.expand(b, h, n), changed.expand(b, hk, n), 100.0), call)
        hidden = torch.arange(n) < (0 if t < 4 else t)
        assert torch.equal(before.out[:, :, hidden], after.out[:, :, hidden]), "a row sees what the mask hides"
        if mechanism.content_based and t == 3:
            assert not torch.equal(before.out[:, :, :3], after.out[:, :, :3]), (
                "rows before token 3 do not see it, although the mask shows it; follow the mask or refuse it in check()"
            )


def check_content_is_ignored(mechanism: Mechanism) -> None:
    """Check that queries and keys change nothing if `content_based` is False."""
    assert not mechanism.content_based, "only mechanisms that ignore content promise this"
    inputs = draw(mechanism)
    for training in (True, False):
        mechanism.train(training)
        before = attend(mechanism, inputs)
        after = attend(mechanism, replace(inputs, q=noise_like(inputs.q, 9.0), k=noise_like(inputs.k, 9.0, seed=8)))
        assert same(before, after), "queries or keys have an influence"


def check_calls_leave_nothing_behind(mechanism: Mechanism) -> None:
    """Check that a call changes neither its inputs nor the mechanism, and repeats after another call."""
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
    """Check that a seed fixes the output, that only stochastic mechanisms depend on it, and evaluation never does."""
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
            found = list_results(after)
            for name, old in list_results(before).items():
                assert torch.equal(old, found[name]), f"hidden tokens of size {size} change {name}"
            for name, gradient in gradients_before.items():
                other = gradients_after[name]
                # The gradient of a projection of NaN is NaN, even if nothing uses its result.
                if gradient is not None and other is not None and name not in ("x", "weight"):
                    assert torch.equal(gradient, other), f"hidden tokens of size {size} change the gradient of {name}"
