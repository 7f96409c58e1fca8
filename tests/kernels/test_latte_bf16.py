"""LATTE's kernel reads bf16 as it is: what it computes is what it computes of the same numbers in fp32."""

import pytest
import torch
from torch import Tensor

from tests.attention.helpers import attend, cast, draw, gradients, noise_like, padded
from tests.kernels.test_latte import assert_same_costs, pair
from thresher.attention import Call, Pattern
from thresher.kernels import latte as kernel
from thresher.kernels.build import usable

pytestmark = pytest.mark.skipif(not usable("latte"), reason="there is no C++ compiler that builds the kernel")

DIMS = [1, 20, 32, 64, 70, 130]  # without pairs, with a rest, in whole vectors of pairs
ROUNDED = 2**-8  # of a number that becomes bf16


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("head_dim", DIMS)
@torch.no_grad()
def test_outputs_are_those_of_fp32_and_rounded_once(pattern: Pattern, head_dim: int) -> None:
    ours, _ = pair(pattern, head_dim)
    lengths = (61, 133) if pattern.cross else (133, 133)
    half = cast(draw(ours, lengths=lengths, value_dim=head_dim + 3, dtype=torch.float32), torch.bfloat16)
    for call in (Call(), padded(pattern, lengths=lengths)):
        one, other = attend(ours, half, call), attend(ours, cast(half, torch.float32), call)
        assert one.out.dtype is torch.bfloat16
        torch.testing.assert_close(one.out.float(), other.out, rtol=ROUNDED, atol=1e-5)
        assert_same_costs(one, other)


@pytest.mark.parametrize("surrogate", ["inside", "compact"])
@pytest.mark.parametrize("head_dim", DIMS)
def test_gradients_are_those_of_fp32_and_rounded_once(head_dim: int, surrogate: str) -> None:
    ours, _ = pair(head_dim=head_dim, surrogate=surrogate, tau=0.2)
    ours.train()
    half = cast(draw(ours, lengths=(133, 133), dtype=torch.float32), torch.bfloat16)
    (_, found), (_, wanted) = (gradients(ours, x, cost=1e-3) for x in (half, cast(half, torch.float32)))
    assert {name for name, x in found.items() if x is not None} == {"q", "k", "v", "thresholds.offset"}
    for name, x in wanted.items():
        one = found[name]
        assert isinstance(x, Tensor)
        assert isinstance(one, Tensor)
        off = (one.double() - x.double()).norm() / x.double().norm()
        assert off < 2 * ROUNDED, name  # the gradient of the output is rounded, too


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@torch.no_grad()
def test_it_is_nearer_to_fp64_than_pytorch_is(spread: float) -> None:
    ours, plain = pair(head_dim=64)
    half = cast(draw(ours, lengths=(300, 300), dtype=torch.float32, spread=spread), torch.bfloat16)
    exact = attend(plain, cast(half, torch.float64)).out
    ours_off, plain_off = ((attend(x, half).out.double() - exact).norm() for x in (ours, plain))
    assert ours_off <= plain_off


@pytest.mark.parametrize("head_dim", DIMS)
@torch.no_grad()
def test_sums_are_made_in_fp32(head_dim: int) -> None:
    q, k, v = (noise_like(torch.empty(2, n, head_dim), seed=n).bfloat16() for n in (3, 77, 78))
    q_codes, q_unit = kernel.encode(q, True, 4, False)
    k_codes, k_unit = kernel.encode(k, True, 4, False)
    assert all(
        torch.equal(a, b) for a, b in zip(kernel.encode(k.float(), True, 4, False), (k_codes, k_unit), strict=True)
    )
    given = (q_codes, k_codes, q_unit, k_unit, None)
    decoded = [kernel.decode(*x, *given, torch.ones(2, 3), True, 0, 256.0, 0.25) for x in _both(q, k, v[:, :77])]
    gate = (*given, None, torch.ones(2), None, None, True, 0, 256.0, True, False, 0.25)
    attended = [kernel.attend(*x, *gate) for x in _both(q, k, v[:, :77])]
    for half, whole in (*zip(*decoded, strict=True), *zip(*attended, strict=True)):
        assert half.dtype is torch.float32
        torch.testing.assert_close(half, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from PyTorch itself
def test_operators_keep_the_rules_of_torch() -> None:
    q, k, v = (noise_like(torch.empty(2, 20, 8), seed=seed).bfloat16().requires_grad_() for seed in range(3))
    (q_codes, q_unit), (k_codes, k_unit) = (kernel.encode(x.detach(), True, 4, False) for x in (q, k))
    theta = torch.ones(2, requires_grad=True)
    gate = (q_codes, k_codes, q_unit, k_unit, None, None, theta, torch.tensor(0.2), 0, True, 0, 256.0, True, True, 0.25)
    torch.library.opcheck(kernel.encode, (q.detach(), True, 4, False))
    torch.library.opcheck(kernel.attend, (q, k, v, *gate))
    saved = [x.detach() for x in kernel.attend(q, k, v, *gate)]
    given = [x.detach() if isinstance(x, Tensor) else x for x in (q, k, v, *gate)]
    torch.library.opcheck(kernel.back, (noise_like(saved[0]), torch.ones(2), saved[0], *saved[2:], *given))
    rows = (q_codes, k_codes, q_unit, k_unit, None, torch.ones(2, 20), True, 0, 256.0, 0.25)
    torch.library.opcheck(kernel.decode, (q.detach(), k.detach(), v.detach(), *rows))


def _both(*x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    return [each.contiguous() for each in x], [each.float() for each in x]
