"""Check shapes, costs, gradients, limits, types and state of a mechanism; `leaks.py` checks for leaks.

Each check takes any built mechanism and raises AssertionError if the mechanism breaks the promise.
"""

import copy
import io
import itertools
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.testing import assert_close

from thresher.attention import Attended, Call, KeyCodes, Mechanism, Pattern
from thresher.testing.comparisons import compare_with_expectation, compare_with_softmax, measure_sampling_error
from thresher.testing.inputs import (
    MILD,
    SHARP,
    Inputs,
    attend,
    cast,
    cast_bias,
    choose_lengths,
    draw,
    gradients,
    last,
    list_results,
    masks,
    noise_like,
    padded,
    same,
    softmax_attention,
    visible_by_definition,
)

DRAWS = 16  # of a stochastic mechanism


def check_shapes_and_costs(mechanism: Mechanism) -> None:
    """Check that outputs and costs have the right shapes and are finite, and that costs count visible pairs."""
    for spread in (MILD, SHARP):
        for value_dim in (mechanism.head_dim, mechanism.head_dim + 3):
            inputs = draw(mechanism, spread=spread, value_dim=value_dim)
            for call in (Call(), *masks(mechanism)):
                for training in (True, False):
                    mechanism.train(training)
                    assert_sound(mechanism, inputs, call, attend(mechanism, inputs, call))


def check_sizes(mechanism: Mechanism) -> None:
    """Check unusual sizes: no token, one, odd numbers, no example, and any two numbers in cross attention."""
    several = [(0, 0), (1, 1), (2, 2), (3, 3), (17, 17)]
    if mechanism.pattern.cross:
        several += [(1, 6), (6, 1), (9, 4), (4, 9), (0, 3), (3, 0)]
    if mechanism.pattern is Pattern.CAUSAL_SELF:
        several += [(1, 6), (4, 9), (0, 3)]
    for lengths, batch in [*((each, 2) for each in several), ((3, 3), 0)]:
        for training in (True, False):
            mechanism.train(training)
            inputs = draw(mechanism, batch=batch, lengths=lengths, spread=SHARP)
            assert_sound(mechanism, inputs, Call(), attend(mechanism, inputs))


def check_gradients_arrive(mechanism: Mechanism) -> None:
    """Check that loss and cost give queries, keys, values and all parameters a finite, non-zero gradient."""
    mechanism.train()
    inputs = draw(mechanism, spread=SHARP, lengths=(16, 16))
    _, found = gradients(mechanism, inputs)
    for name, gradient in found.items():
        if name in ("q", "k") and not mechanism.content_based:
            assert gradient is None or not gradient.any(), (
                f"{name} is declared to have no influence, but has a gradient"
            )
            continue
        assert gradient is not None, f"{name} gets no gradient"
        assert gradient.isfinite().all(), f"{name} gets a gradient that is not finite"
        each_head = gradient.transpose(0, 1) if name in inputs.leaves() and gradient.ndim == 4 else gradient
        assert each_head.flatten(1).any(1).all() if each_head.ndim > 1 else each_head.all(), (
            f"{name} has no gradient in some head"
        )


def check_parameters_can_be_sharded(mechanism: Mechanism) -> None:
    """Check that parameters are fp32 and have at least one dimension, as FSDP requires."""
    for name, parameter in mechanism.named_parameters():
        assert parameter.ndim > 0, f"{name} has no dimension"
        assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}"


def check_dense_limit(mechanism: Mechanism) -> None:
    """Check that a mechanism at its dense limit equals softmax attention: outputs, gradients and total cost."""
    n, m = choose_lengths(mechanism.pattern)
    groups = [g for g in range(1, mechanism.num_heads + 1) if mechanism.num_heads % g == 0]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        bias = noise_like(torch.empty(1, mechanism.num_heads, n, m, dtype=dtype))
        allow = partial(_allow_absolute_and_relative, tolerance)
        for i, call in enumerate((Call(bias=bias), *masks(mechanism), *(Call() for _ in groups))):
            inputs = draw(mechanism, groups=groups[i % len(groups)], dtype=dtype)
            if call.pairs is not None:
                call = replace(call, bias=bias)
            compare_with_softmax(mechanism, inputs, call, softmax_attention(mechanism, inputs, call), allow)


def _allow_absolute_and_relative(tolerance: float, wanted: Tensor) -> Tensor:
    return tolerance * (1 + wanted.abs())


def check_expectation_is_forward(mechanism: Mechanism) -> None:
    """Check that a deterministic mechanism is its own expectation."""
    assert not mechanism.stochastic, "only deterministic mechanisms promise this"
    mechanism.eval()
    inputs = draw(mechanism, spread=SHARP)
    expected = mechanism.expectation(inputs.q, inputs.k, inputs.v, Call(source=inputs.source))
    assert torch.equal(expected, attend(mechanism, inputs).out), "expectation() differs from forward()"


def check_samples_bring_it_near_expectation(default: Mechanism, precise: Mechanism) -> None:
    """Check that `precise` hyper-parameters at least halve the error of a stochastic mechanism."""

    assert default.stochastic, "only stochastic mechanisms promise this"
    inputs = draw(default)
    assert measure_sampling_error(default, inputs, DRAWS) > 0, "there is nothing to improve"
    compare_with_expectation(default, precise, inputs, DRAWS, factor=2)


def check_layout_does_not_matter(mechanism: Mechanism) -> None:
    """Check that non-contiguous inputs give the same result as contiguous ones."""
    inputs = draw(mechanism, spread=SHARP)
    tokens_first = {
        name: x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x
        for name, x in inputs.leaves().items()
    }
    every_other = {
        name: torch.stack([x, noise_like(x)], -1).flatten(-2)[..., ::2] for name, x in inputs.leaves().items()
    }
    for training in (True, False):
        mechanism.train(training)
        wanted, wanted_gradients = gradients(mechanism, inputs)
        for leaves in (tokens_first, every_other):
            assert not leaves["q"].is_contiguous()
            attended, found = gradients(mechanism, inputs.with_leaves(leaves))
            results = list_results(attended)
            for name, reference in list_results(wanted).items():
                assert_close(results[name], reference, atol=1e-12, rtol=1e-12)
            for name, gradient in wanted_gradients.items():
                assert_close(found[name], gradient, atol=1e-6, rtol=1e-6)


def check_decoding_continues_the_sequence(mechanism: Mechanism) -> None:
    """Check that fewer queries than keys in causal self attention give the last rows, as in decoding with a cache.

    Codes of keys that were computed token by token must give the same result. Queries at slots of their own, as in a
    cache with free slots, give the rows of these slots, or are refused.
    """
    assert mechanism.pattern is Pattern.CAUSAL_SELF, "only causal self attention promises this"
    mechanism.eval()
    inputs = draw(mechanism, spread=SHARP, lengths=(9, 9))
    for keys in (None, last([8, 5], 9)):
        whole = mechanism.expectation(inputs.q, inputs.k, inputs.v, Call(keys=keys, source=inputs.source))
        each = [codes for key in inputs.k.split(1, 2) if (codes := mechanism.encode_keys(key)) is not None]
        kept = [KeyCodes(*(torch.cat(parts, 2) for parts in zip(*each, strict=True)))] if each else []
        for rows, codes in itertools.product((1, 2, 5, 9), (None, *kept)):
            call = Call(keys=keys, source=inputs.source, codes=codes)
            part = mechanism.expectation(inputs.q[:, :, -rows:], inputs.k, inputs.v, call)
            assert_close(part, whole[:, :, -rows:], atol=1e-12, rtol=1e-12)
    whole = mechanism.expectation(inputs.q, inputs.k, inputs.v, Call(source=inputs.source))
    slots = torch.tensor([[2, 7]])
    past = (torch.arange(9) <= slots[0, :, None])[None, None]
    with suppress(ValueError):
        call = Call(pairs=past, whole_mask=True, slots=slots, source=inputs.source)
        part = mechanism.expectation(inputs.q[:, :, slots[0]], inputs.k, inputs.v, call)
        assert_close(part, whole[:, :, slots[0]], atol=1e-9, rtol=1e-9)


def check_low_precision(mechanism: Mechanism) -> None:
    """Check that bf16 at the dense limit has at most twice the error of plain attention, and costs stay exact."""
    lengths = (33, 33)
    inputs = draw(mechanism, lengths=lengths, dtype=torch.bfloat16)
    bias = noise_like(torch.empty(1, mechanism.num_heads, *lengths), seed=3).bfloat16()
    for call in (Call(), padded(mechanism.pattern, lengths=lengths), Call(bias=bias)):
        exact = softmax_attention(mechanism, cast(inputs, torch.float64), cast_bias(call, torch.float64))["out"]
        for training in (True, False):
            mechanism.train(training)
            plain = softmax_attention(mechanism, inputs, call)["out"]
            attended, found = gradients(mechanism, inputs, call)
            assert attended.out.dtype == torch.bfloat16, f"bf16 values come out as {attended.out.dtype}"
            _assert_as_precise(attended.out, plain, exact)
            _assert_counts(mechanism, inputs, call, attended)
            with torch.autocast("cpu", torch.bfloat16):
                wide, wide_call = cast(inputs, torch.float32), cast_bias(call, torch.float32)
                plain = softmax_attention(mechanism, wide, wide_call)["out"]
                attended, under_autocast = gradients(mechanism, wide, wide_call)
            _assert_as_precise(attended.out, plain, exact)
            _assert_counts(mechanism, inputs, call, attended)
            for name, gradient in [*found.items(), *under_autocast.items()]:
                assert gradient is None or gradient.isfinite().all(), f"the gradient of {name} is not finite"


def check_any_float_type(mechanism: Mechanism) -> None:
    """Check bf16, fp16, fp32 and fp64: outputs have the type of the values, costs are exact, nothing overflows."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        inputs = draw(mechanism, lengths=(33, 33), spread=SHARP, dtype=dtype)
        for call in (Call(), padded(mechanism.pattern, lengths=(33, 33))):
            for training in (True, False):
                mechanism.train(training)
                attended = attend(mechanism, inputs, call)
                assert attended.out.dtype == dtype, f"{dtype} values come out as {attended.out.dtype}"
                assert attended.out.isfinite().all(), f"output is not finite in {dtype}"
                _assert_counts(mechanism, inputs, call, attended)


def check_nan_in_is_nan_out(mechanism: Mechanism) -> None:
    """Check that a row that reads NaN or infinity shows it, and that other rows and all costs stay unchanged.

    A row reads its own query and its visible keys, if content matters, and the values that change its output.
    """
    n, m = choose_lengths(mechanism.pattern)
    calls = [Call(), padded(mechanism.pattern), padded(mechanism.pattern, left=True), list(masks(mechanism))[-1]]
    ranked = mechanism.ranks_queries and not mechanism.pattern.causal
    for turn, (call, training) in enumerate(itertools.product(calls, (True, False))):
        mechanism.train(training)
        inputs = draw(mechanism, lengths=(n, m))
        before, visible = attend(mechanism, inputs, call), visible_by_definition(mechanism, inputs, call)
        # Tokens take turns, so that each meets each call, mode and name.
        for name, token in zip("qkv", (1, 4, 1, 4)[turn % 2 :], strict=False):
            moved = attend(mechanism, _set_token(inputs, name, token, 3.0), call)
            touched = visible[:, :, :, token] if name != "q" else visible.any(-1) & (torch.arange(n) == token)
            touched = touched & _find_reached(inputs, name)
            # If tokens are ranked together, the content of one may change all rows.
            steady = not ranked and torch.equal(moved.out[~touched], before.out[~touched])
            reads = touched & (moved.out != before.out).any(-1) if name == "v" else touched & mechanism.content_based
            for value in (torch.nan, torch.inf):
                after = attend(mechanism, _set_token(inputs, name, token, value), call)
                what = f"{value} in {name}"
                assert (~after.out[reads].isfinite()).all(), f"{what} does not show in a row that reads it"
                rest = after.out[~touched]
                assert rest.isfinite().all(), f"{what} reaches a row that does not see it"
                assert not steady or torch.equal(rest, before.out[~touched]), f"{what} moves a row that does not see it"
                for of, part in after.cost._asdict().items():
                    assert (part.isfinite() & (part >= 0)).all(), f"{what} makes cost.{of} invalid"


def _find_reached(inputs: Inputs, name: str) -> Tensor:
    """Find the rows that `_set_token` can change, [b, h, 1]: one head, or all heads with projected values."""
    heads = inputs.q.shape[1]
    changed = torch.zeros(len(inputs.q), heads, 1, dtype=torch.bool)
    changed[0, ... if name == "v" and inputs.source is not None else heads - 1] = True
    return changed


def _set_token(inputs: Inputs, name: str, token: int, value: float) -> Inputs:
    """Set one token to a value, in the first example and the last head."""
    leaves = {leaf: x.clone() for leaf, x in inputs.leaves().items()}
    if name == "v" and inputs.source is not None:
        leaves["x"][0, token] = value
    else:
        leaves[name][0, -1, token] = value
    return inputs.with_leaves(leaves)


def check_dropout_is_for_training(mechanism: Mechanism) -> None:
    """Check that `dropout` acts in training only and keeps the mean output and the cost."""
    copies = 1024
    one = draw(mechanism, batch=1)
    inputs = one.with_leaves(
        {name: x if x.ndim == 2 else x.expand(copies, *x.shape[1:]) for name, x in one.leaves().items()}
    )
    before = mechanism.dropout
    try:
        mechanism.dropout = 0.0
        mechanism.train()
        plain = attend(mechanism, inputs)
        without = attend(mechanism.eval(), one)
        mechanism.dropout = 0.5
        assert same(attend(mechanism, one), without), "dropout acts in evaluation"
        dropped = attend(mechanism.train(), inputs)
    finally:
        mechanism.dropout = before
    assert not torch.equal(dropped.out, plain.out), "dropout does nothing in training"
    for drops, full in zip(dropped.cost, plain.cost, strict=True):
        assert torch.equal(drops, full), "dropout changes the cost"
    change = dropped.out - plain.out
    standard_error = change.std(0) / copies**0.5
    assert (change.mean(0).abs() <= 6 * standard_error + 1e-12).all(), "dropout changes the mean output"


def check_state_survives_saving(mechanism: Mechanism) -> None:
    """Check that the state dict holds everything that outputs depend on, and loads with weights_only."""
    mechanism.eval()
    inputs = draw(mechanism, spread=SHARP)
    fresh, changed = copy.deepcopy(mechanism), copy.deepcopy(mechanism)
    with torch.no_grad():
        for i, x in enumerate([*changed.parameters(), *changed.buffers()]):
            if x.is_floating_point():
                x += 0.37 * (i + 1)
    file = io.BytesIO()
    torch.save(changed.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert same(attend(changed, inputs), attend(fresh, inputs)), "something is missing from the state dict"


def check_dense_checkpoint_loads(mechanism: Mechanism) -> None:
    """Check that strict=True accepts a checkpoint without the mechanism, and refuses one with a part of its state."""
    model = torch.nn.ModuleDict({"attention": copy.deepcopy(mechanism)})
    state = {name: x.clone() for name, x in model.state_dict().items()}
    try:
        model.load_state_dict({}, strict=True)
    except RuntimeError as error:
        raise AssertionError("a dense checkpoint does not load") from error
    assert all(torch.equal(state[name], x) for name, x in model.state_dict().items()), (
        "a dense checkpoint changes the state"
    )
    for name in state if len(state) > 1 else ():
        try:
            model.load_state_dict({name: state[name]}, strict=True)
        except RuntimeError:
            continue
        raise AssertionError(f"a checkpoint with nothing but {name} loads without an error")


def check_compiled_equals_eager(mechanism: Mechanism, backend: str = "inductor") -> None:
    """Check that `torch.compile(fullgraph=True)` changes neither output, cost nor gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(mechanism, fullgraph=True, backend=backend)
    inputs = draw(mechanism, spread=SHARP, dtype=torch.float32)
    call = padded(mechanism.pattern)
    mechanism.train()
    wanted, wanted_gradients = gradients(mechanism, inputs, call)
    try:
        with torch._inductor.config.patch(fallback_random=True):  # the same random numbers as in eager mode
            got, got_gradients = gradients(compiled, inputs, call)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise AssertionError("the mechanism does not compile into one graph") from error
    results = list_results(got)
    for name, old in list_results(wanted).items():
        assert_close(results[name], old, atol=1e-5, rtol=1e-5)
    got_gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in got_gradients.items()}
    for name, gradient in wanted_gradients.items():
        assert_close(got_gradients[name], gradient, atol=1e-4, rtol=1e-4)


def assert_sound(mechanism: Mechanism, inputs: Inputs, call: Call, attended: Attended) -> None:
    """Assert the properties of every call: shapes, finite output, valid cost, declared losses."""
    assert attended.out.shape == (*inputs.q.shape[:3], inputs.v.shape[3]), (
        f"output has shape {tuple(attended.out.shape)}"
    )
    assert attended.out.isfinite().all(), "output is not finite"
    _assert_counts(mechanism, inputs, call, attended)
    for name, loss in attended.losses.items():
        assert name in mechanism.auxiliary, f"losses.{name} is not declared in `auxiliary`"
        assert loss.shape == inputs.q.shape[:2], f"losses.{name} has shape {tuple(loss.shape)}"
        assert loss.isfinite().all(), f"losses.{name} is not finite"


def _assert_counts(mechanism: Mechanism, inputs: Inputs, call: Call, attended: Attended) -> None:
    cost, visible = attended.cost, visible_by_definition(mechanism, inputs, call)
    assert torch.equal(mechanism.visible(inputs.q, inputs.k, call), visible), "visible() differs from the contract"
    for name, part in cost._asdict().items():
        assert part.shape == inputs.q.shape[:2], f"cost.{name} has shape {tuple(part.shape)}"
        assert ((part >= 0) & part.isfinite()).all(), f"cost.{name} is negative or not finite"
    pairs = visible.sum((-2, -1)).double()
    assert torch.equal(cost.visible.double(), pairs), "cost.visible does not count visible pairs"
    assert torch.equal(cost.dense.double(), pairs * (inputs.q.shape[-1] + inputs.v.shape[-1])), "cost.dense is wrong"
    assert (cost.kept <= cost.visible).all(), "more pairs are kept than are visible"


def _assert_as_precise(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    error, allowed = ((x.double() - exact).square().mean().sqrt() for x in (got, plain))
    assert error <= 2 * allowed, f"error {error:.1e}, where plain attention has {allowed:.1e}"
