"""LATTE's kernel for one query with cached keys: what the whole sequence's last row is, with kept codes or new ones."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.tails import DECODED_WITHOUT, draw_decoded_tail
from tests.kernels.test_latte import assert_same_costs
from tests.kernels.threads import with_threads
from thresher.attention import Attended, Call, KeyCodes, Pattern
from thresher.attention.latte.mechanism import Latte, kernel
from thresher.attention.shared.sums import RunningSums
from thresher.kernels.build import can_use
from thresher.testing.inputs import Inputs, attend, draw, noise_like, padded

pytestmark = pytest.mark.skipif(not can_use("latte"), reason="there is no C++ compiler that builds the kernel")


def pair(head_dim: int = 20, **settings: object) -> tuple[Latte, Latte]:
    """Return the kernel and PyTorch, both in evaluation."""
    given = {"threshold": 0.8137, "tail": "none"} | settings
    ours, plain = (
        Latte(4, head_dim, Pattern.CAUSAL_SELF, backend=backend, **given)  # type: ignore[arg-type]
        for backend in ("cpu", "reference")
    )
    for mechanism in (ours, plain):
        mechanism.eval()
        mechanism.thresholds.offset.data.copy_(torch.linspace(-0.3, 0.3, 4))  # heads differ
    return ours, plain


def last(inputs: Inputs, call: Call, codes: KeyCodes | None = None) -> tuple[Inputs, Call]:
    """Return what decoding the last token is called with."""
    queries = call.queries if call.queries is None else call.queries[:, -1:]
    return replace(inputs, q=inputs.q[:, :, -1:]), replace(call, queries=queries, codes=codes)


def decoded(mechanism: Latte, inputs: Inputs, call: Call, codes: KeyCodes | None = None) -> Attended:
    return attend(mechanism, *last(inputs, call, codes))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("unit", ["nats", "spread"])
@pytest.mark.parametrize(("est_bits", "split"), [(2, "round"), (4, "round"), (4, "truncate"), (8, "round")])
@pytest.mark.parametrize(("head_dim", "length"), [(20, 133), (64, 64), (70, 1), (1, 17), (130, 200)])
@torch.no_grad()
def test_it_is_the_last_row_of_pytorch(
    groups: int, unit: str, est_bits: int, split: str, head_dim: int, length: int
) -> None:
    ours, plain = pair(head_dim, unit=unit, estimate={"bits": est_bits, "split": split}, always_keep=2)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        inputs = draw(ours, lengths=(length, length), value_dim=11, groups=groups, dtype=dtype)
        for call in (Call(), *(padded(ours.pattern, lengths=(length, length), left=left) for left in (False, True))):
            codes = ours.encode_keys(inputs.k)
            found = [decoded(ours, inputs, call, given) for given in (None, codes)]
            found += [decoded(plain, inputs, call, given) for given in (None, codes)]
            whole = attend(plain, inputs, call).out[:, :, -1:]
            for one in found:
                torch.testing.assert_close(one.out, whole, rtol=tolerance, atol=tolerance)
                assert_same_costs(one, found[-1])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("head_dim", "length"), [(20, 133), (64, 64), (70, 1)])
@torch.no_grad()
def test_a_tail_is_that_of_the_last_row_of_pytorch(groups: int, head_dim: int, length: int) -> None:
    ours, plain = pair(head_dim, tail="mean")
    for mechanism in (ours, plain):
        mechanism.tail.factor.copy_(torch.linspace(0, 1.2, 4))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        inputs = draw(ours, lengths=(length, length), value_dim=11, groups=groups, dtype=dtype)
        for call in (Call(), *(padded(ours.pattern, lengths=(length, length), left=left) for left in (False, True))):
            sums, codes = RunningSums(), ours.encode_keys(inputs.k)
            sums.read(inputs.k[:, :, :-1], inputs.v[:, :, :-1], None if call.keys is None else call.keys[:, :-1])
            cached = replace(call, sums=sums)
            whole = attend(plain, inputs, call)
            for one in (decoded(ours, inputs, call), decoded(ours, inputs, cached, codes)):
                torch.testing.assert_close(one.out, whole.out[:, :, -1:], rtol=tolerance, atol=tolerance)
                assert_same_costs(one, decoded(plain, inputs, call))


def test_values_that_are_not_finite_reach_the_row_through_its_tail() -> None:
    ours, _ = pair(tail="mean")
    inputs = draw(ours, lengths=(30, 30))
    dropped = replace(inputs, k=inputs.k.clone(), v=inputs.v.clone())
    dropped.k[:, 1, 3] = -50 * inputs.q[:, 1, -1]  # head 1 alone
    dropped.v[:, 1, 3, 0] = float("nan")
    found = decoded(ours, dropped, Call()).out
    assert found[:, 1].isnan().all()
    assert found[:, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("est_bits", [2, 4, 8])
@pytest.mark.parametrize("split", ["round", "truncate"])
def test_codes_are_those_of_pytorch_and_grow_key_by_key(est_bits: int, split: str) -> None:
    ours, plain = pair(estimate={"bits": est_bits, "split": split})
    k = draw(ours, lengths=(50, 50), groups=2, dtype=torch.float32).k
    whole, parts = ours.encode_keys(k), [ours.encode_keys(k[:, :, part]) for part in (slice(0, 31), slice(31, 50))]
    assert whole is not None
    for name, codes in zip(KeyCodes._fields, whole, strict=True):
        assert torch.equal(codes, torch.cat([getattr(part, name) for part in parts], 2))
        assert torch.equal(codes, getattr(plain.encode_keys(k), name))


def test_nothing_is_kept_where_a_code_would_depend_on_later_keys_or_is_not_needed() -> None:
    k = torch.randn(1, 4, 9, 8)
    for pattern in set(Pattern) - {Pattern.CAUSAL_SELF}:
        assert Latte(4, 8, pattern).encode_keys(k) is None
    assert Latte(4, 8, Pattern.CAUSAL_SELF, estimate={"bits": "exact"}).encode_keys(k) is None
    assert Latte(4, 8, Pattern.CAUSAL_SELF, estimate={"scoring": "int8"}).encode_keys(k) is None


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@torch.no_grad()
def test_rounding_is_within_twice_that_of_pytorch(spread: float) -> None:
    ours, plain = pair(64)
    inputs = draw(ours, batch=40, lengths=(300, 300), dtype=torch.float32, spread=spread)
    exact = decoded(plain, Inputs(*(x.double() for x in (inputs.q, inputs.k, inputs.v))), Call()).out

    def error(mechanism: Latte) -> Tensor:
        return (decoded(mechanism, inputs, Call()).out.double() - exact).norm()

    assert error(ours) <= 2 * error(plain)


@torch.no_grad()
def test_strided_huge_tiny_half_and_broken_inputs() -> None:
    ours, plain = pair()
    inputs = draw(ours, lengths=(50, 50), dtype=torch.float32)
    strided = Inputs(*(x.mT.contiguous().mT for x in (inputs.q, inputs.k, inputs.v)))
    assert torch.equal(decoded(ours, strided, Call()).out, decoded(ours, inputs, Call()).out)
    for size in (1e-12, 1e12):
        scaled = Inputs(inputs.q * size, inputs.k * size, inputs.v * size)
        one, other = (decoded(mechanism, scaled, Call()) for mechanism in (ours, plain))
        torch.testing.assert_close(one.out, other.out)
        assert_same_costs(one, other)
    half = Inputs(*(x.bfloat16() for x in (inputs.q, inputs.k, inputs.v)))
    one, other = (decoded(mechanism, half, Call()) for mechanism in (ours, plain))
    assert one.out.dtype is torch.bfloat16
    torch.testing.assert_close(one.out, other.out, atol=0.02, rtol=0.02)
    for broken in (float("nan"), float("inf")):
        for x, place in ((inputs.q, 49), (inputs.k, 3)):
            kept = x[0, 0, place].clone()
            x[0, 0, place] = broken
            one, other = (decoded(mechanism, inputs, Call()) for mechanism in (ours, plain))
            torch.testing.assert_close(one.out, other.out, equal_nan=True)
            assert_same_costs(one, other)
            x[0, 0, place] = kept


@torch.no_grad()
def test_hidden_and_dropped_keys_are_not_read() -> None:
    ours, _ = pair()
    inputs = draw(ours, lengths=(50, 50), dtype=torch.float32)
    call = padded(ours.pattern, lengths=(50, 50), left=True)
    assert call.keys is not None
    wanted = decoded(ours, inputs, call)
    hidden = ~call.keys[:, None, :, None].expand_as(inputs.k)
    broken = replace(inputs, k=inputs.k.masked_fill(hidden, torch.nan), v=inputs.v.masked_fill(hidden, torch.nan))
    for codes in (None, ours.encode_keys(broken.k)):
        assert torch.equal(decoded(ours, broken, call, codes).out, wanted.out)
    codes = ours.encode_keys(inputs.k)
    dropped = torch.ones_like(hidden)
    for head in range(4):
        for example in range(2):
            for key in range(50):
                without = replace(inputs, v=inputs.v.clone())
                without.v[example, head, key] += 1
                change = decoded(ours, without, call, codes).out[example, head] - wanted.out[example, head]
                dropped[example, head, key] = not change.any()
    assert 0 < (~dropped[..., 0]).sum() == wanted.cost.kept.sum()
    unread = replace(inputs, k=inputs.k.masked_fill(dropped, torch.nan), v=inputs.v.masked_fill(dropped, torch.nan))
    assert torch.equal(decoded(ours, unread, call, codes).out, wanted.out)


@torch.no_grad()
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    ours, _ = pair(40)
    inputs = draw(ours, lengths=(3000, 3000), dtype=torch.float32, groups=2)
    one = last(inputs, Call(), ours.encode_keys(inputs.k))
    found = with_threads(lambda: attend(ours, *one))
    for other in found[1:]:
        assert torch.equal(found[0].out, other.out)
        assert_same_costs(found[0], other)


def test_a_query_that_is_trained_has_its_gradient() -> None:
    ours, plain = pair(gate={"surrogate": "inside", "tau": 0.1})
    inputs = draw(ours, lengths=(50, 50))
    found = []
    for mechanism in (ours, plain):
        one, call = last(inputs, Call(), mechanism.encode_keys(inputs.k))
        q = one.q.clone().requires_grad_()
        out = attend(mechanism, replace(one, q=q), call).out
        found.append(torch.autograd.grad((out * noise_like(out)).sum(), q)[0])
    assert found[0].any()
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_the_operator_keeps_the_rules_of_torch() -> None:
    q, k, v = (noise_like(torch.empty(2, length, 8), seed=length) for length in (3, 20, 20))
    q_codes, k_codes = ((x * 2).round().clamp(-8, 7).to(torch.int8) for x in (q, k))
    q_unit, k_unit = (torch.full(x.shape[:2], 0.5, dtype=q.dtype) for x in (q, k))
    codes = {"q_codes": q_codes, "k_codes": k_codes, "q_unit": q_unit, "k_unit": k_unit}
    options = {"threshold": torch.ones(2, 3, dtype=q.dtype), "spread": True, "always_keep": 1, "step": 256.0}
    for shown in (None, torch.arange(20).expand(2, 20) > 5):
        given = {"q": q, "k": k, "v": v, "scale": 0.25, "shown_k": shown, **codes, **options}
        for tail in (DECODED_WITHOUT, draw_decoded_tail(q, k, v)):
            torch.library.opcheck(kernel.decode, (), given | tail)
