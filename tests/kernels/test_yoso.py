"""YOSO's kernel computes what PyTorch computes: codes and counts to the bit, sums and gradients within rounding."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.threads import check_threads
from thresher.attention import Call, Pattern
from thresher.attention.yoso import kernel
from thresher.attention.yoso.gradients import Tables, compute_bound, sum_keys, sum_queries
from thresher.attention.yoso.hashing import pack_signs
from thresher.attention.yoso.mechanism import Yoso
from thresher.kernels.build import can_use
from thresher.testing.checks import check_compiled_equals_eager
from thresher.testing.inputs import Inputs, attend, draw, gradients, noise_like, padded

pytestmark = pytest.mark.skipif(not can_use("yoso"), reason="there is no C++ compiler that builds the kernel")


def pair(pattern: Pattern = Pattern.NONCAUSAL_SELF, head_dim: int = 8, **hyperparameters: object) -> tuple[Yoso, Yoso]:
    """Return the kernel and PyTorch through tables, with the same hashes."""
    both = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        options = {"hashes": 5, "hash": {"bits": 3}, "dense_below": 0, "backend": backend} | hyperparameters
        both.append(Yoso(2, head_dim, pattern, **options).train())  # type: ignore[arg-type]
    return both[0], both[1]


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-300))


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize(("bits", "d", "dv"), [(0, 8, 8), (1, 13, 35), (2, 1, 1), (3, 64, 64), (9, 5, 40)])
def test_sums_and_gradients_are_those_of_pytorch(pattern: Pattern, bits: int, d: int, dv: int) -> None:
    """Few bits give buckets that are worked off through outer products, many bits pairs."""
    ours, plain = pair(pattern, d, hash={"bits": bits})
    n, m = (300, 330) if pattern.cross else (330, 330)
    inputs = draw(ours, lengths=(n, m), value_dim=dv)
    for call in (Call(), padded(pattern, lengths=(n, m)), padded(pattern, lengths=(n, m), left=True)):
        (one, grads), (other, wanted) = (gradients(mechanism, inputs, call) for mechanism in (ours, plain))
        torch.testing.assert_close(one.out, other.out, rtol=1e-9, atol=1e-9)
        assert all(torch.equal(a, b) for a, b in zip(one.cost, other.cost, strict=True))
        for name, reference in wanted.items():
            torch.testing.assert_close(grads[name], reference, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize(("bits", "hashes"), [(2, 3), (6, 16)])
def test_rounding_is_within_twice_that_of_pytorch(pattern: Pattern, bits: int, hashes: int) -> None:
    ours, plain = pair(pattern, 32, hash={"bits": bits, "resample": "never"}, hashes=hashes)
    inputs = draw(ours, lengths=(600, 600), dtype=torch.float32)
    q, k = (torch.nn.functional.normalize(x, dim=-1).flatten(0, 1) for x in (inputs.q, inputs.k))
    x = plain.prepare(q.unflatten(0, inputs.q.shape[:2]), k.unflatten(0, inputs.k.shape[:2]), inputs.v, Call())
    codes = plain.compute_codes(x)
    assert all(torch.equal(a, b) for a, b in zip(codes, ours.compute_codes(x, kernel.pack), strict=True))
    v, grad = inputs.v.flatten(0, 1), noise_like(inputs.v.flatten(0, 1))
    slots, shift = 2**bits, x.causal_shift
    way = Tables(slots, "bound", shift, False)
    wide = [x.double() for x in (q, k, v, grad)]
    exact = sum_keys(wide[2], *codes, way), sum_queries(wide[3], *codes, way), *compute_bound(*wide, *codes, way)
    usual = sum_keys(v, *codes, way), sum_queries(grad, *codes, way), *compute_bound(q, k, v, grad, *codes, way)
    got = (
        kernel.sum_keys(v, *codes, None, slots, shift)[0],
        kernel.sum_queries(grad, *codes, slots, shift),
        *kernel.compute_bound(q, k, v, grad, *codes, None, slots, shift, bits / (2 * hashes)),
    )
    for one, other, reference in zip(got, usual, exact, strict=True):
        assert error(one, reference) < 2 * error(other, reference) + 1e-8


@pytest.mark.parametrize(("bits", "hashes", "n"), [(1, 7, 300), (5, 13, 257), (8, 32, 1), (15, 2, 9), (3, 4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_signs_are_those_of_pytorch(bits: int, hashes: int, n: int, dtype: torch.dtype) -> None:
    y = noise_like(torch.empty(n, bits * hashes, dtype=dtype))
    y[::3, ::2] = 0
    y[::5, ::3] = float("nan")
    assert torch.equal(kernel.pack(y, bits), pack_signs(y, bits))
    assert torch.equal(kernel.pack(y.mT.contiguous().mT, bits), pack_signs(y, bits))


@pytest.mark.parametrize("pattern", [Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF])
def test_results_do_not_depend_on_the_number_of_threads(pattern: Pattern) -> None:
    ours, _ = pair(pattern, 40, hash={"bits": 2})
    inputs = draw(ours, lengths=(700, 700), dtype=torch.float32)
    check_threads(ours, inputs)


@pytest.mark.parametrize("pattern", Pattern)
def test_strided_empty_and_huge_inputs(pattern: Pattern) -> None:
    ours, plain = pair(pattern)
    inputs = draw(ours, lengths=(50, 50), dtype=torch.float32)
    strided = Inputs(*(x.mT.contiguous().mT for x in (inputs.q, inputs.k, inputs.v)))
    assert torch.equal(attend(ours, strided).out, attend(ours, inputs).out)
    huge = Inputs(inputs.q * 1e18, inputs.k * 1e-18, inputs.v * 1e15)
    torch.testing.assert_close(attend(ours, huge).out, attend(plain, huge).out)
    nobody = Inputs(*(x[:0] for x in (inputs.q, inputs.k, inputs.v)))
    assert attend(ours, nobody).out.shape == (0, 2, 50, 8)
    half = Inputs(*(x.bfloat16() for x in (inputs.q, inputs.k, inputs.v)))
    torch.testing.assert_close(attend(ours, half).out, attend(plain, half).out)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from PyTorch itself
def test_operators_keep_the_rules_of_torch() -> None:
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 20, 8) for _ in range(4))
    codes_q, codes_k = (torch.randint(0, 8, (3, 2, 20), dtype=torch.int16) for _ in range(2))
    seen = torch.rand(2, 20) > 0.3
    torch.library.opcheck(kernel.pack, (torch.randn(20, 24), 8))
    for hidden in (None, seen):
        torch.library.opcheck(kernel.sum_collisions, (codes_q, codes_k, hidden, v, 8, kernel.PAST, 0))
        torch.library.opcheck(kernel.compute_bound, (q, k, v, grad, codes_q, codes_k, hidden, 8, None, 0.5))


def test_what_the_kernel_cannot_do_is_refused_or_left_to_pytorch() -> None:
    ours, _ = pair()
    inputs = draw(ours)
    call = Call(bias=torch.zeros(1, 1, 7, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match="cannot hold masks of pairs"):
        attend(ours, inputs, call)
    ours.backend = "auto"
    assert torch.equal(attend(ours, inputs, call).out, attend(ours, inputs, replace(call, pairs=None)).out)
    with pytest.raises(ValueError, match="no table"):
        attend(pair(expectation=True)[0], inputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from PyTorch itself
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("pattern", [Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF])
def test_it_compiles_without_graph_breaks(pattern: Pattern) -> None:
    ours, _ = pair(pattern)
    check_compiled_equals_eager(ours, backend="aot_eager")
