"""The feed-forward layer as top-k attention: test K8 of its specification, and what surrounds it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from thresher.feedforward.topk_ffn import Projection, TopKFeedForward
from thresher.testing.inputs import noise_like

WIDTH, HIDDEN, OUT = 6, 20, 5
SILU: Callable[[Tensor], Tensor] = F.silu


def projections(inner: int = 1, bias: bool = True) -> tuple[list[Projection], Projection]:
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    first = [Projection(draw(HIDDEN, WIDTH), draw(HIDDEN) if bias else None) for _ in range(inner)]
    return first, Projection(draw(OUT, HIDDEN), draw(OUT) if bias else None)


def tokens(*shape: int) -> Tensor:
    return noise_like(torch.empty(*shape, WIDTH, dtype=torch.float64)).requires_grad_()


def by_definition(x: Tensor, inner: list[Projection], outer: Projection | None, act: Any, k: int) -> Tensor:
    """Compute all units, mask all but the k best of each token, found by sorting (value, -index)."""
    pre = [F.linear(x, *each) for each in inner]
    hidden = act(pre[0]) * (pre[1] if len(pre) == 2 else 1)
    rank = (pre[0] if len(pre) == 1 else hidden.abs()).detach()
    keep = torch.zeros_like(rank, dtype=torch.bool)
    keep.scatter_(-1, rank.sort(dim=-1, descending=True, stable=True).indices[..., :k], True)
    hidden = hidden * keep
    return hidden if outer is None else F.linear(hidden, *outer)


def gradients(out: Tensor, x: Tensor, inner: list[Projection], outer: Projection | None) -> list[Tensor]:
    leaves = [x, *(t for each in (*inner, *([outer] if outer else [])) for t in each if t is not None)]
    return list(torch.autograd.grad((out * noise_like(out)).sum(), leaves))


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("keys", [1, 4, 0.5, HIDDEN, 1.0, 500], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("inner", "act"), [(1, F.relu), (1, F.gelu), (2, SILU), (2, F.gelu)])
def test_k8_it_is_the_layer_with_all_but_the_k_best_units_masked(
    inner: int, act: Any, bias: bool, keys: float, chunk: int
) -> None:
    k = min(keys, HIDDEN) if isinstance(keys, int) else int(keys * HIDDEN)
    first, outer = projections(inner, bias)
    for last in (outer, None):
        x = tokens(2, 3)
        found = TopKFeedForward(keys=keys, chunk=chunk)(x, first, last, act).out
        wanted = by_definition(x, first, last, act, int(k))
        assert_close(found, wanted, atol=1e-12, rtol=1e-12)
        for mine, reference in zip(gradients(found, x, first, last), gradients(wanted, x, first, last), strict=True):
            assert_close(mine, reference, atol=1e-12, rtol=1e-12)


def test_relu_is_exact_wherever_at_most_k_units_are_positive() -> None:
    first, outer = projections()
    x = tokens(40)
    positive = (F.linear(x, *first[0]) > 0).sum(-1)
    k = int(positive.median())
    out = TopKFeedForward(keys=k)(x, first, outer, F.relu).out
    exact = F.linear(F.linear(x, *first[0]).relu(), *outer)
    same = (out - exact).abs().amax(-1) < 1e-12
    assert torch.equal(same, positive <= k)
    assert 0 < same.sum() < 40


@pytest.mark.parametrize("chunk", [2, 100])
def test_dropout_of_units_is_replayed_in_backward(chunk: int) -> None:
    first, outer = projections()
    layer = TopKFeedForward(keys=5, chunk=chunk)
    layer.dropout = 0.4

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return layer(x, first, outer, F.gelu).out

    x = tokens(7)
    assert torch.autograd.gradcheck(run, x)
    assert not torch.equal(run(x), layer.eval()(x, first, outer, F.gelu).out)


def test_costs_tell_examples_apart_and_count_every_pre_activation() -> None:
    first, outer = projections(inner=2)
    cost = TopKFeedForward(keys=4)(tokens(3, 7), first, outer, SILU).cost
    assert cost.kept.tolist() == [[28.0]] * 3
    assert cost.visible.tolist() == [[140.0]] * 3
    assert cost.dense.tolist() == [[140.0 * (2 * WIDTH + OUT)]] * 3
    assert cost.total.tolist() == [[140.0 * 2 * WIDTH + 28 * OUT]] * 3
    assert TopKFeedForward(keys=4)(tokens(7), first, outer, SILU).cost.kept.tolist() == [[28.0]]


def test_saved_memory_is_k_entries_a_token() -> None:
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    inner = [Projection(torch.randn(512, 8, requires_grad=True), None)]
    outer = Projection(torch.randn(8, 512, requires_grad=True), None)
    x = torch.randn(1024, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept_alive = TopKFeedForward(keys=16, chunk=128)(x, inner, outer, F.gelu)
    assert kept_alive.out.requires_grad
    weights = 2 * 512 * 8 * 4
    assert sum(seen.values()) <= weights + x.nbytes + 1024 * 16 * (4 + 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_and_gradients_come_back_in_fp32(dtype: torch.dtype) -> None:
    inner = [Projection(torch.randn(HIDDEN, WIDTH, requires_grad=True), torch.randn(HIDDEN, requires_grad=True))]
    outer = Projection(torch.randn(OUT, HIDDEN, requires_grad=True), torch.randn(OUT, requires_grad=True))
    x = torch.randn(2, 3, WIDTH, requires_grad=True)
    with torch.autocast("cpu", dtype):
        out = TopKFeedForward(keys=4)(x, inner, outer, F.gelu).out
    assert out.dtype == dtype
    out.float().sum().backward()
    for leaf in (x, *inner[0], *outer):
        assert leaf is not None
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32


def test_no_tokens_are_no_error() -> None:
    first, outer = projections()
    assert TopKFeedForward(keys=4)(tokens(2, 0), first, outer, F.gelu).out.shape == (2, 0, OUT)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    first, outer = projections()
    x = tokens(3)
    (grad,) = torch.autograd.grad(TopKFeedForward(keys=4)(x, first, outer, F.gelu).out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize(("name", "value"), [("keys", 0), ("keys", 1.5), ("keys", -2), ("chunk", 0)])
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        TopKFeedForward(**{name: value})  # type: ignore[arg-type]
