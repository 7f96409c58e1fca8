"""Top-k attention: the numbered tests of its specification (K8, the feed-forward layer, has a file of its own)."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from thresher.attention import Call, Pattern
from thresher.attention.shared.selection import count_kept_keys, find_largest, tabulate_kept_keys
from thresher.attention.shared.tail import TailKind
from thresher.attention.topk.mechanism import TopK
from thresher.testing.inputs import (
    Inputs,
    attend,
    count_saved_bytes,
    draw,
    first,
    gradients,
    noise_like,
    softmax_attention,
)

SELF, CAUSAL = Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF


def topk(pattern: Pattern = SELF, heads: int = 2, tail: TailKind = "none", **hyperparameters: object) -> TopK:
    """Build top-k as published, without a tail, unless it is given one."""
    return TopK(heads, 8, pattern, tail=tail, **hyperparameters)  # type: ignore[arg-type]


def kept_by_definition(inputs: Inputs, call: Call, mechanism: TopK) -> Tensor:
    """Return [b, h, n, m]: the keys of each row, found one row at a time by sorting (score, -index)."""
    visible = mechanism.visible(inputs.q, inputs.k, call)
    scores = inputs.q @ inputs.k.mT * inputs.q.shape[-1] ** -0.5 + (0 if call.bias is None else call.bias.detach())
    keep = torch.zeros_like(visible)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in scores.shape[:3])).tolist():
        row, seen = scores[tuple(place)], visible[tuple(place)].nonzero()[:, 0].tolist()
        ordered = sorted(seen, key=lambda j, row=row: (-float(row[j]), j))
        share = mechanism.keys
        count = share if isinstance(share, int) else max(int(share * len(seen) + 1e-9), 1)
        keep[(*place, ordered[:count])] = True
    return keep


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("keys", [1, 3, 0.5, 0.34], ids=str)
def test_k2_k3_it_is_softmax_attention_over_the_kept_keys_whatever_the_chunk(
    pattern: Pattern, keys: float, chunk: int
) -> None:
    mechanism = topk(pattern, keys=keys, chunk=chunk)
    inputs = draw(mechanism, spread=1.5)
    n, m = inputs.q.shape[2], inputs.k.shape[2]
    bias = noise_like(torch.empty(1, 2, n, m, dtype=torch.float64))
    for call in (Call(), Call(bias=bias), Call(keys=first([m, m - 3], m)), Call(keys=first([m, 2], m), bias=bias)):
        keep = kept_by_definition(inputs, call, mechanism)
        wanted = softmax_attention(mechanism, inputs, Call(pairs=keep, bias=call.bias))
        attended, found = gradients(mechanism, inputs, call)
        assert torch.equal(attended.cost.kept, keep.sum((-2, -1)).float())
        for name, reference in wanted.items():
            assert_close(attended.out if name == "out" else found[name], reference, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_k1_all_keys_is_dense_attention(chunk: int) -> None:
    for keys in (1.0, 7, 100):
        mechanism = topk(keys=keys, chunk=chunk)
        inputs = draw(mechanism)
        wanted = softmax_attention(mechanism, inputs, Call())
        attended, found = gradients(mechanism, inputs)
        for name, reference in wanted.items():
            assert_close(attended.out if name == "out" else found[name], reference, atol=1e-12, rtol=1e-12)


def test_k4_a_causal_row_chooses_among_its_past_and_the_future_has_no_influence() -> None:
    mechanism = topk(CAUSAL, keys=3, chunk=2)
    inputs = draw(mechanism)
    before = attend(mechanism, inputs)
    assert before.cost.kept[0, 0] == 1 + 2 + 3 * 5
    for i in range(6):
        k = inputs.k.clone()
        k[:, :, i + 1 :] += 1e3
        after = attend(mechanism, Inputs(inputs.q, k, inputs.v))
        assert torch.equal(before.out[:, :, : i + 1], after.out[:, :, : i + 1])


def test_k5_a_row_without_a_key_is_zero_not_the_mean_of_arbitrary_values() -> None:
    mechanism = topk(keys=3)
    inputs = draw(mechanism)
    attended, found = gradients(mechanism, inputs, Call(keys=first([0, 7], 7)))
    assert (attended.out[0] == 0).all()
    assert (attended.out[1] != 0).any()
    assert all(g is not None and g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("chunk", [3, 100])
def test_k6_dropout_is_replayed_for_every_chunk_not_the_last_ones_for_all(chunk: int) -> None:
    mechanism = topk(keys=4, chunk=chunk)
    mechanism.dropout = 0.4
    inputs = draw(mechanism, batch=1, lengths=(9, 9))

    def run(*leaves: Tensor) -> Tensor:
        return attend(mechanism, Inputs(*leaves), seed=3).out

    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_k7_autocast_runs_forward_and_backward_and_returns_the_type_of_the_values(dtype: torch.dtype) -> None:
    mechanism = topk(keys=3, chunk=2)
    q, k, v = (x.float().requires_grad_() for x in (lambda i: (i.q, i.k, i.v))(draw(mechanism)))
    with torch.autocast("cpu", dtype):
        out = mechanism(q, k, v.to(dtype), Call()).out
    assert out.dtype == dtype
    out.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in (q, k, v))


def test_k9_the_error_is_the_dropped_mass_times_the_distance_of_the_means() -> None:
    mechanism = topk(keys=3)
    inputs = draw(mechanism)
    keep = kept_by_definition(inputs, Call(), mechanism)
    weights = (inputs.q @ inputs.k.mT * 8**-0.5).softmax(-1)
    kept, dropped = weights * keep, weights * ~keep
    mass = dropped.sum(-1, keepdim=True)
    means = (dropped @ inputs.v) / mass - (kept @ inputs.v) / (1 - mass)
    assert_close(weights @ inputs.v - attend(mechanism, inputs).out, mass * means, atol=1e-12, rtol=1e-12)


def test_k10_saved_memory_grows_with_the_length_not_with_its_square() -> None:
    small, large = (count_saved_bytes(topk(keys=16, chunk=64), n) for n in (512, 1024))
    assert 1.8 < large / small < 2.2
    assert large < 1024 * 1024 * 2 * 4


def test_k11_the_gradient_of_the_bias_is_that_of_autograd_for_every_shape_of_it() -> None:
    mechanism = topk(keys=3, chunk=2)
    inputs = draw(mechanism)
    for shape in ((1, 1), (1, 2), (2, 1), (2, 2)):
        bias = noise_like(torch.empty(*shape, 7, 7, dtype=torch.float64)).requires_grad_()
        keep = kept_by_definition(inputs, Call(bias=bias), mechanism)
        wanted = softmax_attention(mechanism, inputs, Call(pairs=keep, bias=bias))["bias"]
        _, found = gradients(mechanism, inputs, Call(bias=bias))
        assert_close(found["bias"], wanted, atol=1e-12, rtol=1e-12)


def test_k12_kept_counts_short_causal_rows_and_padding_exactly() -> None:
    call = Call(queries=first([5, 2], 7), keys=first([5, 2], 7))
    cost = attend(topk(CAUSAL, keys=3), draw(topk(CAUSAL)), call).cost
    assert cost.kept[:, 0].tolist() == [1 + 2 + 3 + 3 + 3, 1 + 2]
    assert cost.visible[:, 0].tolist() == [15, 3]
    share = attend(topk(CAUSAL, keys=0.5), draw(topk(CAUSAL)), call).cost
    assert share.kept[:, 0].tolist() == [1 + 1 + 1 + 2 + 2, 1 + 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_scores_are_kept_from_the_lower_index_on(dtype: torch.dtype) -> None:
    scores = torch.tensor([[0.0, 1.0, -0.0, 1.0, 0.0, -torch.inf, -2.0]], dtype=dtype)[None, None]
    assert find_largest(scores, 7).tolist() == [[[[1, 3, 0, 2, 4, 6, 5]]]]
    many = torch.randint(-3, 3, (2, 3, 5, 64)).to(dtype)
    assert torch.equal(find_largest(many, 10), many.sort(dim=-1, descending=True, stable=True).indices[..., :10])


def test_the_order_of_floats_is_kept_over_their_whole_range() -> None:
    scores = torch.cat([torch.randn(500) * 10.0**e for e in (-42, -38, -3, 0, 3, 37)]).expand(1, 1, 1, -1)
    wanted = scores.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(find_largest(scores, scores.shape[-1]), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nan_is_not_hidden_by_the_selection(dtype: torch.dtype) -> None:
    inputs = draw(topk(), dtype=dtype)
    inputs.k[0, 0, 4] = float("nan")
    assert attend(topk(keys=1), inputs).out[0, 0].isnan().all()


def test_a_share_is_rounded_down_whatever_its_binary_form() -> None:
    cpu = torch.device("cpu")
    assert tabulate_kept_keys(0.29, 100, cpu)[100] == count_kept_keys(0.29, 100) == 29
    assert tabulate_kept_keys(0.15, 49, cpu)[49] == count_kept_keys(0.15, 49) == 7
    assert tabulate_kept_keys(0.1, 4, cpu).tolist() == [0, 1, 1, 1, 1]
    assert tabulate_kept_keys(3, 4, cpu).tolist() == [0, 1, 2, 3, 3]


def test_more_than_32767_keys_need_wider_indices() -> None:
    mechanism = TopK(1, 2, Pattern.NONCAUSAL_CROSS, keys=2, tail="none")
    k = torch.zeros(1, 1, 40_000, 2)
    k[0, 0, 39_999] = 5.0
    v = torch.arange(40_000.0)[None, None, :, None].requires_grad_()
    out = mechanism(torch.ones(1, 1, 1, 2), k, v, Call()).out
    out.sum().backward()
    assert v.grad is not None
    assert v.grad.flatten().nonzero().flatten().tolist() == [0, 39_999]


@pytest.mark.parametrize(("name", "value"), [("keys", 0), ("keys", 0.0), ("keys", 1.5), ("keys", -2), ("chunk", 0)])
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        topk(**{name: value})


def test_a_second_derivative_is_refused_not_wrong() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    (first_order,) = torch.autograd.grad(topk(keys=2)(q, k, v, Call()).out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        first_order.sum().backward()


def test_infinity_minus_infinity_is_not_hidden_by_the_selection_either() -> None:
    """On x86 it is a nan with its sign bit set."""
    scores = torch.tensor([1.0, 2.0, float("inf")]) - torch.tensor([0.0, 0.0, float("inf")])
    assert find_largest(scores[None, None, None], 1).item() == 2
