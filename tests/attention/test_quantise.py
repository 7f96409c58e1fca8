"""Codes, their halves and their product: integers, and exact ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from thresher.attention.latte.quantise import Halves, complete_product, estimate_product, quantise, split_codes
from thresher.testing.inputs import noise_like

BITS = [2, 4, 8]
SPLITS = ["round", "truncate"]


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return noise_like(torch.empty(shape, dtype=dtype))


@pytest.mark.parametrize("per_token", [False, True])
def test_codes_are_the_nearest_multiples_of_their_scale(per_token: bool) -> None:
    x = randn(2, 3, 5, 4)
    codes, scale = quantise(x, per_token)
    assert scale.shape == ((2, 3, 5, 1) if per_token else (2, 3, 1, 1))
    assert torch.equal(codes, codes.round())
    assert codes.abs().amax() == 127
    assert ((codes * scale - x).abs() <= scale / 2 + 1e-12).all()


def test_one_scale_serves_an_example_and_head_and_no_other() -> None:
    x = randn(2, 2, 3, 4)
    x[0, 1] *= 10
    codes, scale = quantise(x, per_token=False)
    assert_close(scale[..., 0, 0], x.abs().amax((-2, -1)) / 127)
    assert (codes.abs().amax((-2, -1)) == 127).all()


def test_a_scale_for_each_token_depends_on_that_token_alone() -> None:
    x = randn(1, 1, 4, 8)
    codes, scale = quantise(x, per_token=True)
    x[:, :, 2:] *= 1000
    later_codes, later_scale = quantise(x, per_token=True)
    assert torch.equal(codes[:, :, :2], later_codes[:, :, :2])
    assert torch.equal(scale[:, :, :2], later_scale[:, :, :2])


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_and_the_smallest_numbers_have_finite_codes(dtype: torch.dtype, per_token: bool) -> None:
    x = torch.zeros(1, 2, 3, 4, dtype=dtype)
    codes, scale = quantise(x, per_token)
    assert (codes == 0).all()
    assert (scale > 0).all()
    x[0, 1] = torch.finfo(dtype).tiny
    codes, scale = quantise(x, per_token)
    assert codes.isfinite().all()
    assert scale.isfinite().all()


def test_hidden_tokens_that_are_zero_leave_the_scale_alone() -> None:
    x = randn(1, 1, 3, 4)
    longer = torch.cat([x, torch.zeros(1, 1, 2, 4, dtype=x.dtype)], dim=2)
    assert torch.equal(quantise(x, False)[1], quantise(longer, False)[1])


def test_quantising_passes_no_gradient() -> None:
    codes, scale = quantise(randn(1, 1, 2, 2).requires_grad_(), False)
    assert not codes.requires_grad
    assert not scale.requires_grad


@pytest.mark.parametrize("bits", BITS)
def test_truncation_takes_the_top_bits_of_twos_complement(bits: int) -> None:
    codes = torch.arange(-128, 128)
    high, low, step = split_codes(codes.double(), bits, "truncate")
    assert torch.equal(high.long(), codes >> (8 - bits))
    assert torch.equal(low.long(), codes & (step - 1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rule", SPLITS)
def test_high_and_low_parts_fit_their_bits_and_add_up(bits: int, rule: str) -> None:
    codes = torch.arange(-128, 128).double()
    high, low, step = split_codes(codes, bits, rule)
    assert torch.equal(high * step + low, codes)
    assert high.min() >= -(2 ** (bits - 1))
    assert high.max() <= 2 ** (bits - 1) - 1
    unclamped = codes < (2 ** (bits - 1) - 0.5) * step
    assert (low[unclamped].abs() <= (step / 2 if rule == "round" else step - 1)).all()


def test_eight_bits_are_the_whole_code() -> None:
    codes = torch.arange(-128, 128).double()
    for rule in SPLITS:
        high, low, step = split_codes(codes, 8, rule)
        assert torch.equal(high, codes)
        assert not low.any()
        assert step == 1


def halves(codes: Tensor, bits: int, rule: str) -> Halves:
    return split_codes(codes.double(), bits, rule)


@settings(derandomize=True, database=None, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dim=st.integers(1, 64),
    bits=st.sampled_from(BITS),
    rule=st.sampled_from(SPLITS),
)
def test_the_completed_product_is_the_integer_product(seed: int, dim: int, bits: int, rule: str) -> None:
    rng = torch.Generator().manual_seed(seed)
    q, k = (torch.randint(-128, 128, (1, 1, n, dim), generator=rng) for n in (3, 4))
    q_half, k_half = halves(q, bits, rule), halves(k, bits, rule)
    estimate = estimate_product(q_half, k_half)
    assert torch.equal(estimate.long(), (q_half.high.long() @ k_half.high.long().transpose(-2, -1)) * 4 ** (8 - bits))
    assert torch.equal(complete_product(estimate, q_half, k_half).long(), q @ k.transpose(-2, -1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rule", SPLITS)
@pytest.mark.parametrize("sign", [1, -1])
def test_fp32_adds_1024_products_of_the_largest_codes_exactly(bits: int, rule: str, sign: int) -> None:
    q = torch.full((1, 1, 1, 1024), 127)
    k = torch.full((1, 1, 1, 1024), 127 * sign)
    q_half, k_half = (split_codes(x.float(), bits, rule) for x in (q, k))
    product = complete_product(estimate_product(q_half, k_half), q_half, k_half)
    assert product.dtype == torch.float32
    assert product.item() == sign * 127 * 127 * 1024
