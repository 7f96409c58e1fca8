"""LATTE's kernel reads bf16 as it is: what it computes is what it computes of the same numbers in fp32."""

import pytest
import torch
from torch import Tensor

from tests.kernels.tails import DECODED_WITHOUT, WITHOUT
from tests.kernels.test_latte import assert_same_costs, check_rules, pair
from thresher.attention import Call, Pattern
from thresher.attention.latte import kernel
from thresher.kernels.build import can_use
from thresher.testing.inputs import attend, cast, draw, gradients, noise_like, padded

pytestmark = pytest.mark.skipif(not can_use("latte"), reason="there is no C++ compiler that builds the kernel")

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
    ours, _ = pair(head_dim=head_dim, gate={"surrogate": surrogate, "tau": 0.2})
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
    gate = _gate(q_codes, k_codes, q_unit, k_unit, torch.ones(2), tau=None, shift=None)
    attended = [kernel.attend(**x, scale=0.25, **WITHOUT, **gate._asdict()) for x in _both(q, k, v[:, :77])]
    decoded = [_decode(x, gate, rows=3) for x in _both(q, k, v[:, :77])]
    for half, whole in (*zip(*decoded, strict=True), *zip(*attended, strict=True)):
        assert half.dtype is torch.float32
        torch.testing.assert_close(half, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from PyTorch itself
def test_operators_keep_the_rules_of_torch() -> None:
    q, k, v = (noise_like(torch.empty(2, 20, 8), seed=seed).bfloat16().requires_grad_() for seed in range(3))
    (q_codes, q_unit), (k_codes, k_unit) = (kernel.encode(x.detach(), True, 4, False) for x in (q, k))
    threshold = torch.ones(2, requires_grad=True)
    gate = _gate(q_codes, k_codes, q_unit, k_unit, threshold, tau=torch.tensor(0.2), shift=0)
    torch.library.opcheck(kernel.encode, (q.detach(), True, 4, False))
    check_rules(q, k, v, gate)
    given = {"q": q.detach(), "k": k.detach(), "v": v.detach(), "scale": 0.25}
    torch.library.opcheck(kernel.decode, (), given | _decoding(gate, rows=20))


def _gate(
    q_codes: Tensor,
    k_codes: Tensor,
    q_unit: Tensor,
    k_unit: Tensor,
    threshold: Tensor,
    tau: Tensor | None,
    shift: int | None,
) -> kernel.Gate:
    return kernel.Gate(
        q_codes=q_codes,
        k_codes=k_codes,
        q_unit=q_unit,
        k_unit=k_unit,
        shown_q=None,
        shown_k=None,
        threshold=threshold,
        tau=tau,
        shift=shift,
        spread=True,
        always_keep=0,
        step=256.0,
        into_scores=True,
        inside=tau is not None,
    )


def _decoding(gate: kernel.Gate, rows: int) -> dict[str, object]:
    """Return what of a gate decoding takes, with a threshold for each row."""
    names = ("q_codes", "k_codes", "q_unit", "k_unit", "shown_k", "spread", "always_keep", "step")
    threshold = gate.threshold.detach()[:, None].expand(-1, rows)
    return {name: getattr(gate, name) for name in names} | {"threshold": threshold} | DECODED_WITHOUT


def _decode(x: dict[str, Tensor], gate: kernel.Gate, rows: int) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = kernel.decode(**x, scale=0.25, **_decoding(gate, rows))
    return found


def _both(q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    given = {"q": q, "k": k, "v": v}
    return {name: x.contiguous() for name, x in given.items()}, {name: x.float() for name, x in given.items()}
