"""Top-k's kernel computes what PyTorch computes: the same keys, outputs and gradients within rounding."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.tails import WITHOUT, draw_tail
from tests.kernels.threads import check_threads
from thresher.attention import Call, Pattern
from thresher.attention.shared.selection import find_largest
from thresher.attention.shared.sums import RunningSums
from thresher.attention.shared.tail import TailKind
from thresher.attention.topk import kernel
from thresher.attention.topk.mechanism import TopK
from thresher.kernels.build import can_use
from thresher.testing.checks import check_compiled_equals_eager
from thresher.testing.inputs import Inputs, attend, draw, gradients, noise_like, padded

pytestmark = pytest.mark.skipif(not can_use("topk"), reason="there is no C++ compiler that builds the kernel")
SIZES = [(60, 60), (61, 273), (190, 40), (1, 33), (9, 133)]
FEW_AND_MANY = [9, 300]  # queries: keys are read as they lie, or packed


def pair(
    pattern: Pattern = Pattern.NONCAUSAL_SELF, head_dim: int = 16, keys: float = 0.3, tail: TailKind = "none"
) -> tuple[TopK, TopK]:
    """Return the kernel and PyTorch."""
    return (
        TopK(2, head_dim, pattern, keys=keys, tail=tail, backend="cpu").train(),
        TopK(2, head_dim, pattern, keys=keys, tail=tail, backend="reference").train(),
    )


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("keys", [1, 7, 39, 0.3, 1.0])
@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize(("whole", "tail"), [(True, "none"), (False, "none"), (False, "mean")])
def test_outputs_gradients_and_costs_are_those_of_pytorch(
    pattern: Pattern, keys: float, n: int, m: int, whole: bool, tail: TailKind
) -> None:
    """Whole numbers make scores exact, and many of them equal."""
    ours, plain = pair(pattern, keys=keys, tail=tail)
    m = m if pattern.cross or (pattern.causal and n <= m) else n
    inputs = draw(ours, lengths=(n, m), value_dim=11)
    if whole:
        inputs = Inputs(inputs.q.round(), inputs.k.round(), inputs.v)
    calls = [Call()]
    if pattern.cross or n == m:
        calls += [padded(pattern, lengths=(n, m)), padded(pattern, lengths=(n, m), left=True)]
    for call in calls:
        (one, grads), (other, wanted) = (gradients(mechanism, inputs, call) for mechanism in (ours, plain))
        torch.testing.assert_close(one.out, other.out, rtol=1e-10, atol=1e-10)
        assert all(torch.equal(a, b) for a, b in zip(one.cost, other.cost, strict=True))
        for name, reference in wanted.items():
            exact = 1e-5 if name == "tail.factor" else 1e-10  # stored in fp32
            torch.testing.assert_close(grads[name], reference, rtol=exact, atol=exact)


@pytest.mark.parametrize("keys", [1, 3, 64, 128, 600, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("queries", [1, 20])
def test_the_largest_scores_are_kept_of_equal_ones_the_lower_index(keys: int, dtype: torch.dtype, queries: int) -> None:
    """With one dimension and a query of 1 the keys are the scores: ties, zeros of both signs, infinities and nan."""
    torch.manual_seed(0)
    scores = torch.randn(40, 1000, dtype=dtype)
    scores[1:10] = (2 * scores[1:10]).round()
    scores[10] = 3.0
    scores[11] = scores[11].sort().values
    scores[12] = scores[12].sort(descending=True).values
    scores[13, ::7], scores[13, ::5], scores[13, ::3] = float("inf"), -float("inf"), -0.0
    scores[14, 5::9], scores[14, ::4] = float("nan"), float("inf")
    scores[15:20] *= torch.tensor(1e30, dtype=dtype)
    limit = torch.full((40, queries), keys)
    q, k = torch.ones(40, queries, 1, dtype=dtype), scores[..., None]
    _, _, index, _ = kernel.attend(q, k, torch.zeros_like(k), 1.0, None, limit, keys, None, None)
    wanted = find_largest(scores, keys).sort(-1).values
    assert torch.equal(index.long(), wanted[:, None].expand(40, queries, keys))


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("n", FEW_AND_MANY)
def test_rounding_is_within_twice_that_of_pytorch(pattern: Pattern, spread: float, n: int) -> None:
    ours, plain = pair(pattern, 32, keys=40)
    inputs = draw(ours, lengths=(n, 300 if pattern.cross else n), dtype=torch.float32, spread=spread)
    wide = Inputs(*(x.double() for x in (inputs.q, inputs.k, inputs.v)))
    found = []
    for mechanism, given in ((ours, inputs), (plain, inputs), (plain, wide)):
        attended, grads = gradients(mechanism, given)
        found.append([attended.out, *(grads[name] for name in "qkv")])
    for one, other, reference in zip(*found, strict=True):
        assert error(one, reference) < 2 * error(other, reference) + 1e-8


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("n", FEW_AND_MANY)
def test_results_do_not_depend_on_the_number_of_threads(pattern: Pattern, n: int) -> None:
    ours, _ = pair(pattern, 40)
    inputs = draw(ours, lengths=(n, 300 if pattern.cross else n), dtype=torch.float32)
    check_threads(ours, inputs)


@pytest.mark.parametrize("pattern", Pattern)
def test_strided_empty_huge_and_broken_inputs(pattern: Pattern) -> None:
    ours, plain = pair(pattern)
    inputs = draw(ours, lengths=(50, 50), dtype=torch.float32)
    strided = Inputs(*(x.mT.contiguous().mT for x in (inputs.q, inputs.k, inputs.v)))
    assert torch.equal(attend(ours, strided).out, attend(ours, inputs).out)
    huge = Inputs(inputs.q * 1e12, inputs.k * 1e12, inputs.v * 1e15)
    torch.testing.assert_close(attend(ours, huge).out, attend(plain, huge).out)
    nobody = Inputs(*(x[:0] for x in (inputs.q, inputs.k, inputs.v)))
    assert attend(ours, nobody).out.shape == (0, 2, 50, 16)
    half = Inputs(*(x.bfloat16() for x in (inputs.q, inputs.k, inputs.v)))
    torch.testing.assert_close(attend(ours, half).out, attend(plain, half).out, atol=0.02, rtol=0.02)
    inputs.q[0, 0, 3] = float("nan")
    assert attend(ours, inputs).out[0, 0, 3].isnan().all()
    assert attend(ours, inputs).out[1].isfinite().all()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("head_dim", "length"), [(20, 133), (64, 64), (70, 1)])
@torch.no_grad()
def test_a_decoded_tail_is_that_of_the_last_row_with_sums_of_a_cache_or_without(
    groups: int, head_dim: int, length: int
) -> None:
    ours = TopK(4, head_dim, Pattern.CAUSAL_SELF, keys=0.2, tail="mean", backend="cpu")
    plain = TopK(4, head_dim, Pattern.CAUSAL_SELF, keys=0.2, tail="mean", backend="reference")
    for mechanism in (ours, plain):
        mechanism.tail.factor.copy_(torch.linspace(0, 1.2, 4))  # type: ignore[union-attr]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        inputs = draw(ours, lengths=(length, length), value_dim=11, groups=groups, dtype=dtype)
        last = replace(inputs, q=inputs.q[:, :, -1:])
        for call in (Call(), *(padded(ours.pattern, lengths=(length, length), left=left) for left in (False, True))):
            sums = RunningSums()
            sums.read(inputs.k[:, :, :-1], inputs.v[:, :, :-1], None if call.keys is None else call.keys[:, :-1])
            one = replace(call, queries=None if call.queries is None else call.queries[:, -1:])
            wanted = attend(plain, last, one)
            for given in (one, replace(one, sums=sums)):
                found = attend(ours, last, given)
                torch.testing.assert_close(found.out, wanted.out, rtol=tolerance, atol=tolerance)
                assert torch.equal(found.cost.kept, wanted.cost.kept)
            torch.testing.assert_close(
                wanted.out, attend(plain, inputs, call).out[:, :, -1:], rtol=tolerance, atol=tolerance
            )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from PyTorch itself
def test_operators_keep_the_rules_of_torch() -> None:
    q, k, v = (noise_like(torch.empty(2, 20, 8), seed=seed).requires_grad_() for seed in range(3))
    limit, seen = torch.randint(0, 5, (2, 20)), torch.arange(20).expand(2, 20) > 5
    for hidden, shift in ((None, None), (seen, None), (None, 0)):
        limited = limit if shift is None else limit.minimum(torch.arange(20) + 1)
        for tail in (WITHOUT, draw_tail(q)):
            given = {"q": q, "k": k, "v": v, "scale": 0.5, "seen": hidden, "shift": shift, **tail}
            torch.library.opcheck(kernel.attend, (), given | {"limit": limited, "most": 5})
            bare = {name: x.detach() if isinstance(x, Tensor) else x for name, x in given.items()}
            out, weight, index, tail_weight = kernel.attend(**bare, limit=limited, most=5)
            results = {"weight": weight, "index": index, "tail_weight": tail_weight, "out": out}
            torch.library.opcheck(kernel.back, (), bare | results | {"grad": noise_like(out)})


def test_what_the_kernel_cannot_do_is_refused_or_left_to_pytorch() -> None:
    ours, plain = pair()
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from PyTorch itself
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("pattern", [Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF])
def test_it_compiles_without_graph_breaks(pattern: Pattern) -> None:
    check_compiled_equals_eager(pair(pattern)[0], backend="aot_eager")
