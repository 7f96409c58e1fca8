"""YOSO: the numbered tests of its specification; references are plain PyTorch in fp64."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from thresher.attention import Call, Pattern
from thresher.attention.yoso.hashing import (
    collision_probability,
    collision_slope,
    compute_gaussian_codes,
    compute_hadamard_codes,
    walsh_hadamard,
)
from thresher.attention.yoso.mechanism import Yoso
from thresher.attention.yoso.tables import count_collisions, sum_causal_collisions, sum_collisions
from thresher.testing.inputs import Inputs, attend, count_saved_bytes, draw, first, gradients, noise_like, padded

SELF, CAUSAL = Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF


def yoso(pattern: Pattern = SELF, **hyperparameters: object) -> Yoso:
    torch.manual_seed(0)
    made = Yoso(2, 8, pattern, **({"dense_below": 0} | hyperparameters)).eval()  # type: ignore[arg-type]
    return made.double()


def weights_by_definition(mechanism: Yoso, inputs: Inputs, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return cosines, the share of hashes in which visible pairs collide, and the mask, all [b, h, n, m]."""
    q, k = (F.normalize(x, dim=-1) for x in (inputs.q, inputs.k))
    codes = mechanism.compute_codes(mechanism.prepare(inputs.q, inputs.k, inputs.v, Call()))
    visible = mechanism.visible(inputs.q, inputs.k, call)
    same = sum((a[..., :, None] == b[..., None, :]).double() for a, b in zip(*codes, strict=True))
    assert isinstance(same, Tensor)
    return q @ k.mT, same.view(visible.shape) / mechanism.hashes * visible, visible


def test_1_pairs_collide_as_often_as_the_closed_form_says() -> None:
    draws = 40_000
    for bits, cosine in itertools.product((1, 4, 9), (-1.0, -0.5, 0.0, 0.5, 0.8, 0.95, 1.0)):
        torch.manual_seed(0)
        directions = torch.randn(draws, bits, 2, dtype=torch.float64)
        pair = torch.tensor([[[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]]], dtype=torch.float64)
        codes = ((pair @ directions.mT) > 0).all(-1) if bits == 0 else gaussian_codes_fast(pair, directions)
        share = float((codes[:, 0] == codes[:, 1]).double().mean())
        p = float(collision_probability(torch.tensor(cosine, dtype=torch.float64), bits))
        if abs(cosine) == 1:
            assert share == p == (cosine > 0)
        else:
            assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / draws), (bits, cosine)


def gaussian_codes_fast(pair: Tensor, directions: Tensor) -> Tensor:
    """Return the codes that `compute_gaussian_codes` gives, without a loop over hashes; a few are compared."""
    bits = (torch.einsum("nd,mbd->mnb", pair[0], directions) > 0).double()
    codes = bits @ (2.0 ** torch.arange(directions.shape[1], dtype=torch.float64))
    assert torch.equal(compute_gaussian_codes(pair, directions[:50])[:, 0].double(), codes[:50])
    return codes


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("hash", ["gaussian", "hadamard"])
@pytest.mark.parametrize("bits", [1, 4])
def test_2_5_and_6_tables_are_the_matrix_of_collisions_forward_and_backward(
    pattern: Pattern, hash: str, bits: int
) -> None:
    """dV is the exact adjoint; dQ and dK are sum (g.v) bits / 2 B k, by the same codes."""
    table, pairs = (yoso(pattern, hash={"bits": bits, "kind": hash}, dense_below=below) for below in (0, 1000))
    for lengths in ((7, 7), (5, 9), (1, 6), (9, 4)):
        n, m = lengths if pattern.cross or lengths[0] <= lengths[1] else lengths[::-1]
        inputs = draw(table, lengths=(n, m))
        for call in (Call(), Call(keys=first([m, max(m - 2, 1)], m))):
            _, shares, _ = weights_by_definition(table, inputs, call)
            leaves = {name: x.clone().requires_grad_() for name, x in inputs.leaves().items()}
            q, k = (F.normalize(leaves[name], dim=-1) for name in ("q", "k"))
            cosine = q @ k.mT
            linear = shares * (1 + bits / 2 * (cosine - cosine.detach()))
            mean = linear @ leaves["v"]
            out = F.normalize(mean, dim=-1).masked_fill((mean == 0).all(-1, keepdim=True), 0)
            wanted = torch.autograd.grad((out * noise_like(out)).sum(), list(leaves.values()))
            for mechanism in (table, pairs):
                attended, found = gradients(mechanism, inputs, call)
                assert_close(attended.out, out, atol=1e-12, rtol=1e-12)
                bound = torch.minimum(shares.sum(-1) * 32, mechanism.visible(inputs.q, inputs.k, call).sum(-1).double())
                assert_close(attended.cost.kept.double(), bound.sum(-1))
                for name, reference in zip(leaves, wanted, strict=True):
                    assert_close(found[name], reference, atol=1e-10, rtol=1e-10)


def test_3_the_error_to_the_expectation_falls_with_the_root_of_the_number_of_hashes() -> None:
    counts, errors, means = (16, 64, 256, 1024), [], []
    inputs = draw(yoso(), lengths=(32, 32), batch=1)
    q, k = (F.normalize(x, dim=-1).flatten(0, 1) for x in (inputs.q, inputs.k))
    exact = collision_probability(q @ k.mT, 6) @ inputs.v.flatten(0, 1)
    for count in counts:
        torch.manual_seed(count)
        draws = [compute_gaussian_codes(torch.cat([q, k], 1), torch.randn(count, 6, 8).double()) for _ in range(12)]
        sums = torch.stack(
            [sum_collisions(c[..., :32], c[..., 32:], inputs.v.flatten(0, 1), 64) / count for c in draws]
        )
        errors.append(float((sums - exact).norm() / exact.norm()))
        means.append((sums.mean(0) - exact) / (sums.std(0) / 12**0.5 + 1e-12))
    slope = torch.tensor(errors).log().diff().mean() / math.log(4)
    assert -0.6 < float(slope) < -0.4
    assert float(torch.stack(means).abs().quantile(0.99)) < 4  # 12 draws: a t distribution of 11 degrees of freedom


def test_4_hadamard_codes_are_signs_of_the_explicit_product() -> None:
    torch.manual_seed(0)
    x, signs = torch.randn(2, 5, 13, dtype=torch.float64), torch.randn(3, 3, 16).sign()
    matrix = torch.ones(1, 1).double()
    for _ in range(4):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), matrix)
    assert torch.equal(walsh_hadamard(torch.eye(16).double()), matrix)
    codes = compute_hadamard_codes(x, signs, 8, 5)
    assert codes.shape == (8, 2, 5)
    wide = F.pad(x, (0, 3))
    for part in range(3):
        y = wide
        for sign in signs[part].double():
            y = (y * sign) @ matrix
        for cut in range(3):
            if part * 3 + cut < 8:
                bits = (y[..., cut * 5 : cut * 5 + 5] > 0).long()
                assert torch.equal(codes[part * 3 + cut].long(), (bits * 2 ** torch.arange(5)).sum(-1))
    assert torch.equal(codes, compute_hadamard_codes(7 * x, signs, 8, 5))
    assert torch.equal(codes, 2**5 - 1 - compute_hadamard_codes(-x, signs, 8, 5))
    assert codes.max() < 2**5
    assert codes.min() >= 0


@pytest.mark.parametrize(("cosine", "published"), [(0.0, 0.0027), (0.5, 0.0325), (0.8, 0.151), (0.95, 0.423)])
def test_4_hadamard_codes_agree_a_little_less_often_than_independent_bits(cosine: float, published: float) -> None:
    torch.manual_seed(0)
    pairs = 10_000
    a = F.normalize(torch.randn(pairs, 32), dim=-1)
    b = torch.randn(pairs, 32)
    b = F.normalize(b - (a * b).sum(-1, keepdim=True) * a, dim=-1)
    x = torch.stack([a, cosine * a + math.sqrt(1 - cosine**2) * b], 1)
    codes = torch.cat([compute_hadamard_codes(part, torch.randn(1, 3, 32).sign(), 4, 8) for part in x.split(100)], 1)
    share = (codes[..., 0] == codes[..., 1]).float().mean(0).mean().item()
    assert abs(share - published) < 4 * math.sqrt(published / (4 * pairs)) + 0.03 * published


def test_7_the_bound_lies_below_the_derivative_and_is_tight_in_the_middle() -> None:
    x = torch.linspace(-0.9999, 0.9999, 20_001, dtype=torch.float64)
    for bits in (1, 6, 12):
        ratio = collision_slope(x, bits) / (bits / 2 * collision_probability(x, bits))
        assert (ratio > 1).all()
        assert_close(ratio.min(), torch.tensor(1.0991).double(), atol=1e-4, rtol=0)
        assert abs(float(x[ratio.argmin()]) - 0.442) < 1e-3


@pytest.mark.parametrize("pattern", Pattern)
def test_8_the_exact_gradient_is_the_derivative_of_the_expectation(pattern: Pattern) -> None:
    mechanism = yoso(pattern, expectation=True, grad="exact", hash={"bits": 4})
    inputs = draw(mechanism, batch=1)

    def run(*leaves: Tensor) -> Tensor:
        return attend(mechanism, Inputs(*leaves), padded(pattern, batch=1)).out

    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("pattern", Pattern)
def test_the_exact_gradient_of_a_sample_is_that_of_the_pairwise_form(pattern: Pattern) -> None:
    table, pairs = (yoso(pattern, hash={"bits": 3}, grad="exact", dense_below=below) for below in (0, 1000))
    inputs = draw(table, lengths=(300, 310))
    (_, one), (_, other) = (gradients(mechanism, inputs) for mechanism in (table, pairs))
    for name, reference in other.items():
        assert_close(one[name], reference, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("n", [1, 7, 513])
def test_9_padding_is_masked_and_any_number_of_tokens_will_do(n: int, pattern: Pattern) -> None:
    """transformers' port turns both values of its mask into 1."""
    mechanism = yoso(pattern, hash={"bits": 3})
    inputs = draw(mechanism, lengths=(n, n), batch=1)
    longer = Inputs(*(torch.cat([x, noise_like(x)], 2) for x in (inputs.q, inputs.k, inputs.v)))
    mask = first([n], 2 * n)
    padded_out = attend(mechanism, longer, Call(queries=mask, keys=mask)).out[:, :, :n]
    assert_close(padded_out, attend(mechanism, inputs).out, atol=1e-12, rtol=1e-12)


def test_10_permuted_tokens_permute_the_output() -> None:
    mechanism = yoso(hash={"bits": 3})
    inputs = draw(mechanism, lengths=(20, 20))
    order = torch.randperm(20)
    permuted = Inputs(*(x[:, :, order] for x in (inputs.q, inputs.k, inputs.v)))
    assert_close(attend(mechanism, permuted).out, attend(mechanism, inputs).out[:, :, order], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("n", [40, 600])
def test_11_the_future_leaves_no_trace_in_causal_tables_not_even_of_rounding(n: int) -> None:
    mechanism = yoso(CAUSAL, hash={"bits": 3}, hashes=4)
    inputs = draw(mechanism, lengths=(n, n), batch=1)
    before = attend(mechanism, inputs).out
    for t in (0, n // 2, n - 2):
        later = [x.clone() for x in (inputs.q, inputs.k, inputs.v)]
        for x in later:
            x[:, :, t + 1 :] = 1e3 * noise_like(x[:, :, t + 1 :])
        assert torch.equal(attend(mechanism, Inputs(*later)).out[:, :, : t + 1], before[:, :, : t + 1])


@pytest.mark.parametrize("block", [1, 3, 100])
@pytest.mark.parametrize(("n", "k"), [(7, 7), (4, 9), (1, 5), (9, 4)])
def test_12_causal_sums_are_those_of_a_masked_matrix_for_any_lengths_and_blocks(n: int, k: int, block: int) -> None:
    torch.manual_seed(0)
    receivers, senders = torch.randint(0, 4, (3, 2, n)), torch.randint(0, 4, (3, 2, k))
    x = torch.randn(2, k, 5, dtype=torch.float64)
    shift = max(k - n, 0)
    wanted = count_collisions(receivers, senders, x.dtype).tril(shift) @ x
    assert_close(sum_causal_collisions(receivers, senders, x, 4, shift, block), wanted)


@pytest.mark.parametrize("pattern", [SELF, CAUSAL])
def test_13_the_convolution_is_added_after_the_normalisation(pattern: Pattern) -> None:
    plain, mixed = yoso(pattern, hash={"bits": 1}), yoso(pattern, hash={"bits": 1}, conv=3)
    mixed.draws.copy_(plain.draws)
    inputs = draw(plain)
    difference = attend(mixed, inputs).out - attend(plain, inputs).out
    assert mixed.filters is not None
    offsets = (-2, -1, 0) if pattern.causal else (-1, 0, 1)
    for i, head in itertools.product(range(7), range(2)):
        taps = [(o, w) for o, w in zip(offsets, mixed.filters[head, 0], strict=True) if 0 <= i + o < 7]
        wanted = sum(w * inputs.v[:, head, i + o] for o, w in taps)
        assert_close(difference[:, head, i], wanted, atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match="set conv=0"):
        attend(mixed, inputs, Call(pairs=torch.ones(1, 1, 7, 7).bool()))


@pytest.mark.parametrize("pattern", Pattern)
def test_14_head_outputs_have_unit_length_or_are_zero(pattern: Pattern) -> None:
    for bits in (0, 3, 12):
        mechanism = yoso(pattern, hash={"bits": bits}, hashes=2)
        attended, found = gradients(mechanism, draw(mechanism, lengths=(20, 20)), padded(pattern, lengths=(20, 20)))
        length = attended.out.norm(dim=-1)
        assert (((length - 1).abs() < 1e-12) | (length == 0)).all()
        assert all(g is not None and g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("grad", ["bound", "exact"])
@pytest.mark.parametrize("expectation", [True, False])
def test_equal_and_opposite_vectors_give_finite_gradients(grad: str, expectation: bool) -> None:
    mechanism = yoso(grad=grad, expectation=expectation)
    one = torch.ones(1, 2, 6, 8, dtype=torch.float64)
    one[:, :, 3:] = -1
    _, found = gradients(mechanism, Inputs(one, one, noise_like(one)))
    assert all(g is not None and g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("pattern", [SELF, CAUSAL])
def test_saved_memory_grows_with_the_length_not_with_its_square(pattern: Pattern) -> None:
    small, large = (count_saved_bytes(Yoso(2, 8, pattern, hash={"bits": 8}, hashes=8), n) for n in (2048, 4096))
    assert 1.8 < large / small < 2.2


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"hashes": 0}, "hashes must be a whole number, at least 1"),
        ({"hash": {"bits": 16}}, r"bits must be a whole number, 0 \.\. 15"),
        ({"hash": {"bits": 9, "kind": "hadamard"}}, r"1 \.\. 8 bits at head_dim 8"),
        ({"grad": "none"}, "grad must be one of bound, exact"),
        ({"conv": 4}, "odd width"),
        ({"conv": 3, "pattern": Pattern.NONCAUSAL_CROSS}, "needs self attention"),
    ],
    ids=str,
)
def test_hyperparameters_out_of_range_are_refused(wrong: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        yoso(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("expectation", [True, False])
@pytest.mark.parametrize("size", [1.0, 100.0, -200.0])
def test_a_bias_multiplies_by_its_exponential_and_a_mask_of_pairs_hides(size: float, expectation: bool) -> None:
    mechanism = yoso(hash={"bits": 2}, expectation=expectation)
    inputs = draw(mechanism)
    pairs = noise_like(torch.empty(2, 2, 7, 7), seed=3) > -0.5
    bias = (size + noise_like(torch.empty(1, 2, 7, 7, dtype=torch.float64))).requires_grad_()
    cosine, shares, visible = weights_by_definition(mechanism, inputs, Call(pairs=pairs))
    weights = collision_probability(cosine, 2) * visible if expectation else shares
    mean = weights * (bias - bias.detach().amax(-1, keepdim=True)).exp() @ inputs.v
    out = F.normalize(mean, dim=-1).masked_fill((mean == 0).all(-1, keepdim=True), 0)
    (wanted,) = torch.autograd.grad((out * noise_like(out)).sum(), bias)
    attended, found = gradients(mechanism, inputs, Call(pairs=pairs, bias=bias))
    assert_close(attended.out, out, atol=1e-10, rtol=1e-10)
    assert_close(found["bias"], wanted, atol=1e-10, rtol=1e-10)
    assert_close(attended.cost.score[0, 0], pairs[0, 0].sum() * 8.0)
