"""SMYRF's kernel computes what PyTorch computes: the same pairs meet, outputs and gradients within rounding."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.clusters import assign_once
from tests.kernels.threads import check_threads, with_threads
from thresher.attention import Call, Pattern
from thresher.attention.smyrf import kernel
from thresher.attention.smyrf.layout import compute_ranks
from thresher.attention.smyrf.mechanism import Smyrf
from thresher.kernels.build import can_use
from thresher.testing.checks import check_compiled_equals_eager
from thresher.testing.inputs import Inputs, attend, draw, gradients, noise_like, padded

pytestmark = pytest.mark.skipif(not can_use("smyrf"), reason="there is no C++ compiler that builds the kernel")


def pair(
    pattern: Pattern = Pattern.NONCAUSAL_SELF, head_dim: int = 8, **hyperparameters: object
) -> tuple[Smyrf, Smyrf]:
    """Return the kernel and PyTorch, with the same hashes."""
    both = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        options = {"cluster": 7, "rounds": 3, "backend": backend} | hyperparameters
        both.append(Smyrf(2, head_dim, pattern, **options).train())  # type: ignore[arg-type]
    return both[0], both[1]


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize(("cluster", "rounds"), [(7, 3), (16, 1), (60, 2)])
@pytest.mark.parametrize(("n", "m", "d", "dv"), [(61, 61, 8, 8), (61, 133, 5, 19), (190, 100, 64, 64), (1, 90, 1, 3)])
def test_outputs_gradients_and_costs_are_those_of_pytorch(
    pattern: Pattern, cluster: int, rounds: int, n: int, m: int, d: int, dv: int
) -> None:
    ours, plain = pair(pattern, d, cluster=cluster, rounds=rounds)
    m = m if pattern.cross or (pattern.causal and n <= m) else n
    inputs = draw(ours, lengths=(n, m), value_dim=dv, spread=1.5)
    calls = [Call()]
    if pattern.cross or n == m:
        calls += [padded(pattern, lengths=(n, m)), padded(pattern, lengths=(n, m), left=True)]
    for call in calls:
        (one, grads), (other, wanted) = (gradients(mechanism, inputs, call) for mechanism in (ours, plain))
        torch.testing.assert_close(one.out, other.out, rtol=1e-9, atol=1e-9)
        assert all(torch.equal(a, b) for a, b in zip(one.cost, other.cost, strict=True))
        for name, reference in wanted.items():
            torch.testing.assert_close(grads[name], reference, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_rounding_is_within_twice_that_of_pytorch(
    pattern: Pattern, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clusters are those of fp32 in all three."""
    ours, plain = pair(pattern, 32, cluster=50)
    inputs = draw(ours, lengths=(400, 400), dtype=torch.float32, spread=spread)
    assign_once(monkeypatch)
    wide = Inputs(*(x.double() for x in (inputs.q, inputs.k, inputs.v)))
    found = []
    for mechanism, given in ((ours, inputs), (plain, inputs), (plain, wide)):
        attended, grads = gradients(mechanism, given)
        found.append([attended.out, *(grads[name] for name in "qkv")])
    for one, other, reference in zip(*found, strict=True):
        assert error(one, reference) < 2 * error(other, reference) + 1e-8


@pytest.mark.parametrize("pattern", Pattern)
def test_results_do_not_depend_on_the_number_of_threads(pattern: Pattern) -> None:
    ours, _ = pair(pattern, 40)
    inputs = draw(ours, lengths=(300, 300), dtype=torch.float32)
    check_threads(ours, inputs)


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("rounds", [2, 3, 5])
@pytest.mark.parametrize("scale", [1.0, 2.0**14, 2.0**30, 2.0**50])
def test_scores_however_huge_make_means_of_values(scale: float, rounds: int, pattern: Pattern) -> None:
    """Not so in PyTorch's fused attention, which has a log-sum-exp alone; it needs values as wide as keys."""
    both = pair(pattern, cluster=4, rounds=rounds)
    inputs = draw(both[0], lengths=(61, 61), value_dim=3, dtype=torch.float32)
    same = inputs.k[:, :, :1].expand_as(inputs.k)  # every key has the same score
    inputs = Inputs(inputs.q * scale, same, inputs.v)
    (one, grads), (other, wanted) = (gradients(mechanism, inputs) for mechanism in both)
    torch.testing.assert_close(one.out, other.out)
    torch.testing.assert_close(grads["v"], wanted["v"])
    weights = noise_like(one.out).sum(2)  # those of a query sum to one
    assert grads["v"] is not None
    torch.testing.assert_close(grads["v"].sum(2), weights, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 2, 17, 5000])
def test_ranks_are_those_of_a_stable_sort(n: int, dtype: torch.dtype) -> None:
    hashes = torch.randn(2, 3, n, dtype=dtype, generator=torch.Generator().manual_seed(n))
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), -float("nan")], dtype=dtype)
    for x in (
        hashes,
        hashes * 1e30,
        (hashes * 3).floor(),  # many are equal
        (hashes > 0).to(dtype) * -1.0,  # -0 and -1
        special[hashes.gt(0).long() + hashes.gt(0.5).long() * 2 + hashes.gt(1).long()],
        special[torch.randint(6, hashes.shape, generator=torch.Generator().manual_seed(n))],
        hashes.mT.contiguous().mT,
        hashes[:0],
    ):
        assert torch.equal(kernel.compute_ranks(x), compute_ranks(x))
        assert all(torch.equal(rank, compute_ranks(x)) for rank in with_threads(lambda x=x: kernel.compute_ranks(x)))


@pytest.mark.parametrize("pattern", Pattern)
def test_strided_empty_huge_and_broken_inputs(pattern: Pattern) -> None:
    ours, plain = pair(pattern)
    inputs = draw(ours, lengths=(50, 50), dtype=torch.float32)
    strided = Inputs(*(x.mT.contiguous().mT for x in (inputs.q, inputs.k, inputs.v)))
    assert torch.equal(attend(ours, strided).out, attend(ours, inputs).out)
    huge = Inputs(inputs.q * 1e12, inputs.k * 1e12, inputs.v * 1e15)
    torch.testing.assert_close(attend(ours, huge).out, attend(plain, huge).out)
    nobody = Inputs(*(x[:0] for x in (inputs.q, inputs.k, inputs.v)))
    assert attend(ours, nobody).out.shape == (0, 2, 50, 8)
    half = Inputs(*(x.bfloat16() for x in (inputs.q, inputs.k, inputs.v)))
    torch.testing.assert_close(attend(ours, half).out, attend(plain, half).out)
    inputs.q[0, 0, 3] = float("nan")
    assert attend(ours, inputs).out[0, 0, 3].isnan().all()
    assert attend(ours, inputs).out[1].isfinite().all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from PyTorch itself
def test_operators_keep_the_rules_of_torch() -> None:
    ours, _ = pair(Pattern.CAUSAL_SELF)
    inputs = draw(ours, lengths=(30, 30), dtype=torch.float32, batch=1)
    calls: list[dict[str, Any]] = []
    original = kernel.attend_in_parts
    try:
        kernel.attend_in_parts = lambda **given: calls.append(given) or original(**given)  # type: ignore
        attend(ours, inputs)
    finally:
        kernel.attend_in_parts = original
    (given,) = calls
    assert len(given["token_q"]) > 1  # a gradient for each of several parts
    leaves = {name: given[name].clone().requires_grad_() for name in "qkv"}
    torch.library.opcheck(original, (), given | leaves)
    torch.library.opcheck(kernel.compute_ranks, (torch.randn(2, 3, 30),))
    results = dict(zip(kernel.RESULTS, original(**given), strict=True))
    del results["meetings"], results["repeats"]
    torch.library.opcheck(kernel.back, (), {"grad": noise_like(results["out"])} | results | given)


@pytest.mark.parametrize("dedup", ["none", "count"])
def test_what_the_kernel_cannot_do_is_refused_or_left_to_pytorch(dedup: str) -> None:
    ours, plain = pair(dedup=dedup, cluster=3)
    inputs = draw(ours)
    bias = Call(bias=torch.zeros(1, 1, 7, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match="no masks of pairs and no biases"):
        attend(ours, inputs, bias)
    ours.dropout = plain.dropout = 0.5
    with pytest.raises(ValueError, match="no dropout"):
        attend(ours, inputs)
    ours.backend = "auto"
    for call in (bias, Call()):
        assert torch.equal(attend(ours, inputs, call).out, attend(plain, inputs, call).out)
    with pytest.raises(ValueError, match="dedup=count"):
        attend(pair(dedup="count", cluster=3)[0], inputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from PyTorch itself
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("pattern", [Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF])
def test_it_compiles_without_graph_breaks(pattern: Pattern) -> None:
    ours, _ = pair(pattern, cluster=3)
    check_compiled_equals_eager(ours, backend="aot_eager")
