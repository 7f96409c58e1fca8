"""MCA: the numbered tests of its specification."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from thresher.attention import Call, Pattern, ValueSource
from thresher.attention.mca.mechanism import Mca, compute_chances
from thresher.testing.inputs import Inputs, attend, draw, first, gradients, noise_like, softmax_attention

SELF = Pattern.NONCAUSAL_SELF


def mca(pattern: Pattern = SELF, **hyperparameters: object) -> Mca:
    return Mca(2, 8, pattern, **hyperparameters).train()  # type: ignore[arg-type]


def with_source(n: int = 12, d: int = 24, batch: int = 1, seed: int = 0) -> Inputs:
    """Draw inputs whose W is not square and whose features differ in size."""
    rng = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, 2, n, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    x = torch.randn(batch, n, d, generator=rng, dtype=torch.float64)
    weight = torch.randn(16, d, generator=rng, dtype=torch.float64) * torch.linspace(0.1, 2, d).double()
    source = ValueSource(x, weight, torch.randn(16, generator=rng, dtype=torch.float64))
    v = (x @ weight.mT + source.bias).unflatten(-1, (2, 8)).transpose(1, 2)  # type: ignore[operator]
    return Inputs(q, k, v, source)


def values_of(inputs: Inputs) -> Tensor:
    """Return x W without its bias, [b, h, n, dv]."""
    assert inputs.source is not None
    return (inputs.source.x @ inputs.source.weight.mT).unflatten(-1, (2, 8)).transpose(1, 2)


def encoded(mechanism: Mca, inputs: Inputs, counts: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    assert inputs.source is not None
    return mechanism.project(inputs.source, counts)


def attention_of(inputs: Inputs) -> Tensor:
    return (inputs.q @ inputs.k.mT * 8**-0.5).softmax(-1)


@pytest.mark.parametrize("alpha", [0.0, 1e-3])
@pytest.mark.parametrize("path", ["dense", "gather"])
def test_m1_a_small_error_coefficient_is_dense_attention(path: str, alpha: float) -> None:
    mechanism = mca(alpha=alpha, path=path, sampling={"draws": "shared"})
    inputs = draw(mechanism, dtype=torch.float32)
    attended, found = gradients(mechanism, inputs, cost=0)
    for name, reference in softmax_attention(mechanism, inputs, Call()).items():
        assert_close(attended.out if name == "out" else found[name], reference, atol=2e-6, rtol=1e-5)


def test_an_error_coefficient_that_fp32_rounds_to_zero_spoils_no_padding() -> None:
    mechanism = mca(alpha=1e-200)
    inputs, call = draw(mechanism, dtype=torch.float32), Call(keys=first([3, 7], 7))
    attended, found = gradients(mechanism, inputs, call)
    assert_close(attended.out, softmax_attention(mechanism, inputs, call)["out"], atol=2e-6, rtol=1e-5)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())


def bias_of_the_mean(mechanism: Mca, draws: int) -> tuple[float, float]:
    """Return the error of the mean output over draws, and the largest z score of an entry."""
    inputs = with_source()
    outs = torch.stack([attend(mechanism, inputs, seed=seed).out for seed in range(draws)])
    error = outs.mean(0) - attention_of(inputs) @ inputs.v
    return float(error.norm()), float((error / (outs.std(0) / draws**0.5)).abs().max())


@pytest.mark.parametrize("sampler", ["multinomial", "poisson"])
def test_m2_the_mean_over_draws_converges_to_exact_attention(sampler: str) -> None:
    few, _ = bias_of_the_mean(mca(alpha=1.5, sampling={"distribution": sampler}), 50)
    many, z = bias_of_the_mean(mca(alpha=1.5, sampling={"distribution": sampler}), 800)
    assert 2.5 < few / many < 6.5
    assert z < 5


def test_m5_rounding_counts_down_as_the_official_code_does_is_biased() -> None:
    mechanism = mca(alpha=4.0, reproduce_paper=True)
    _, z = bias_of_the_mean(mechanism, 800)
    assert z > 10


@pytest.mark.parametrize("sampler", ["multinomial", "poisson"])
def test_m3_the_variance_is_that_of_the_formula(sampler: str) -> None:
    inputs, mechanism = with_source(n=6), mca(sampling={"distribution": sampler})
    assert inputs.source is not None
    counts = torch.full((1, 2, 6), 4.0).double()
    exact, draws = values_of(inputs), 4000
    square = sum((encoded(mechanism, inputs, counts, seed) - exact).square().sum((1, 2, 3)) for seed in range(draws))
    norm_w = inputs.source.weight.square().sum()
    wanted = inputs.source.x.square().sum() * norm_w / 4
    if sampler == "multinomial":
        wanted = wanted - exact.square().sum() / 4
    assert_close(square.mean() / draws, wanted, rtol=0.05, atol=0.0)  # type: ignore[union-attr]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 4.0])
def test_m4_the_error_keeps_the_published_bound(alpha: float) -> None:
    inputs = with_source()
    assert inputs.source is not None
    exact = attention_of(inputs) @ inputs.v
    errors = torch.stack([(attend(mca(alpha=alpha), inputs, seed=seed).out - exact).norm(dim=-1) for seed in range(40)])
    beta = inputs.source.x.norm(dim=-1).mean()
    size = inputs.source.weight.unflatten(0, (2, 8)).square().sum((1, 2)).sqrt()
    bound = (alpha * beta * size)[None, :, None]
    assert (errors.mean(0) <= bound).all()
    for delta in (0.1, 0.5):
        assert float((errors > bound / delta).double().mean()) <= delta


def test_m6_features_are_drawn_by_the_norms_of_the_input_axis_not_of_the_output_axis() -> None:
    inputs = with_source()
    assert inputs.source is not None
    weight = inputs.source.weight.unflatten(0, (2, 8))
    chances = compute_chances(weight)
    assert chances.shape == (2, 24)
    for head in range(2):
        columns = torch.stack([weight[head, :, feature].square().sum() for feature in range(24)])
        assert_close(chances[head], columns / columns.sum())
    assert_close(compute_chances(torch.zeros(1, 3, 5)), torch.full((1, 5), 0.2))


@pytest.mark.parametrize("draws", ["token", "shared"])
def test_m7_padding_changes_neither_outputs_nor_the_honest_fraction(draws: str) -> None:
    """The paper's code counts padded length, and lets padded queries raise the importance of keys."""
    mechanism = mca(alpha=1.5, sampling={"draws": draws})
    inputs = with_source(n=9)
    longer = with_source(n=15, seed=5)
    assert inputs.source is not None
    assert longer.source is not None
    parts = {name: torch.cat([getattr(inputs, name), getattr(longer, name)[:, :, 9:]], 2) for name in ("q", "k", "v")}
    x = torch.cat([inputs.source.x, longer.source.x[:, 9:]], 1)
    padded = Inputs(**parts, source=inputs.source._replace(x=x))
    call = Call(queries=first([9], 15), keys=first([9], 15), source=padded.source)
    assert_close(attend(mechanism, padded, call).out[:, :, :9], attend(mechanism, inputs).out, atol=1e-12, rtol=1e-12)
    plain = mechanism.measure_fractions(inputs.q, inputs.k, inputs.v, Call(source=inputs.source))
    other = mechanism.measure_fractions(padded.q, padded.k, padded.v, call)
    assert_close(plain.valid, other.valid)
    assert_close(plain.padded * 9 / 15, other.padded)
    assert_close(plain.layer, other.layer)


def test_m8_gradients_over_draws_converge_to_exact_ones_for_a_given_gradient_of_the_output() -> None:
    inputs = with_source(n=6)
    assert inputs.source is not None

    def gradients_of(out_of: Callable[[dict[str, Tensor], ValueSource], Tensor]) -> Tensor:
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.leaves().items()}
        out = out_of(leaves, inputs.source._replace(x=leaves["x"], weight=leaves["weight"]))  # type: ignore[union-attr]
        found = torch.autograd.grad((out * noise_like(out)).sum(), list(leaves.values()))
        return torch.cat([(g / g.norm()).flatten() if out_of is exact else g.flatten() for g in found])

    def exact(leaves: dict[str, Tensor], source: ValueSource) -> Tensor:
        v = torch.nn.functional.linear(*source).unflatten(-1, (2, 8)).transpose(1, 2)
        return (leaves["q"] @ leaves["k"].mT * 8**-0.5).softmax(-1) @ v

    def sampled(leaves: dict[str, Tensor], source: ValueSource) -> Tensor:
        return mca(alpha=1.0)(leaves["q"], leaves["k"], inputs.v, Call(source=source)).out  # type: ignore[no-any-return]

    torch.manual_seed(0)
    drawn = torch.stack([gradients_of(sampled) for _ in range(800)])
    sizes = [x.numel() for x in inputs.leaves().values()]
    for part, wanted in zip(drawn.split(sizes, 1), gradients_of(exact).split(sizes), strict=True):
        scale = (part.mean(0) * wanted).sum()  # `wanted` has length 1
        few, many = (float((part[:count].mean(0) / scale - wanted).norm()) for count in (50, 800))
        assert 2 < few / many < 8
        assert many < 0.3


@pytest.mark.parametrize("path", ["dense", "gather"])
def test_m8_the_gradient_of_a_sample_is_that_of_finite_differences(path: str) -> None:
    mechanism = mca(alpha=3.0, path=path, sampling={"draws": "shared", "resample": "never"})
    inputs = with_source(n=5, d=6)
    assert inputs.source is not None
    source, counts = inputs.source, torch.tensor([[[1.0, 2, 3, 5, 6], [0, 1, 4, 6, 2]]]).double()
    chances = compute_chances(source.weight.unflatten(0, (2, 8)))

    def run(x: Tensor, weight: Tensor) -> Tensor:
        split = weight.unflatten(0, (2, 8))
        if path == "gather":
            return mechanism.project_gathered(x, split, chances, counts)
        return (x[:, None] * mechanism.sample(chances, counts, 6)) @ split.mT

    assert torch.autograd.gradcheck(run, (source.x.requires_grad_(), source.weight.requires_grad_()), fast_mode=True)


def test_the_exact_gradient_is_that_of_dense_attention_whatever_was_drawn() -> None:
    mechanism = mca(alpha=2.0, grad="exact")
    inputs = draw(mechanism)
    _, found = gradients(mechanism, inputs, cost=0)
    for name, reference in softmax_attention(mechanism, inputs, Call()).items():
        if name != "out":
            assert_close(found[name], reference, atol=1e-10, rtol=1e-10)


def test_what_is_gathered_is_what_the_dense_simulation_weighs() -> None:
    inputs = with_source(n=20, d=24, batch=2)
    for alpha in (0.5, 1.5, 4.0):
        dense, gather = (mca(alpha=alpha, sampling={"draws": "shared"}, path=path) for path in ("dense", "gather"))
        (one, of_dense), (other, of_gather) = (gradients(mechanism, inputs) for mechanism in (dense, gather))
        assert_close(one.out, other.out, atol=1e-10, rtol=1e-10)
        for name, reference in of_dense.items():
            assert_close(of_gather[name], reference, atol=1e-9, rtol=1e-9)


def test_m9_a_larger_error_coefficient_is_cheaper_and_noisier() -> None:
    inputs = with_source()
    exact = attention_of(inputs) @ inputs.v
    fractions, errors = [], []
    for alpha in (0.2, 0.5, 1.0, 2.0, 5.0):
        mechanism = mca(alpha=alpha)
        fractions.append(
            float(mechanism.measure_fractions(inputs.q, inputs.k, inputs.v, Call(source=inputs.source)).valid)
        )
        drawn = [attend(mechanism, inputs, seed=seed).out for seed in range(60)]
        errors.append(float(torch.stack([(out - exact).norm() for out in drawn]).mean()))
    assert fractions == sorted(fractions, reverse=True)
    assert errors == sorted(errors)


def test_m10_a_seed_fixes_every_bit() -> None:
    inputs = with_source()
    mechanism = mca(alpha=2.0)
    assert torch.equal(attend(mechanism, inputs, seed=3).out, attend(mechanism, inputs, seed=3).out)
    assert not torch.equal(attend(mechanism, inputs, seed=3).out, attend(mechanism, inputs, seed=4).out)
    fixed = [mca(alpha=2.0, sampling={"seed": seed}).eval() for seed in (0, 0, 1)]
    outs = [attend(one, inputs).out for one in fixed]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_m11_samples_are_counted_as_by_hand_the_cap_included() -> None:
    weights = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.1, 0.7, 0.2, 0.0], [0.25, 0.5, 0.25, 0.0]])[None, None]
    mechanism = Mca(1, 8, Pattern.NONCAUSAL_CROSS, alpha=1.0)
    q, kv = torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 4, 8)

    def counted(mechanism: Mca, weights: Tensor, call: Call) -> list[list[list[float]]]:
        x = mechanism.prepare(q[:, : weights.shape[1]], kv, kv, call)
        return mechanism.count_samples(weights, x, 6).tolist()

    assert counted(mechanism, weights, Call()) == [[[4.0, 6.0, 1.0, 0.0]]]
    valid = Call(keys=first([3], 4))
    assert counted(mechanism, weights, valid) == [[[3.0, 5.0, 1.0, 0.0]]]  # (3 * 0.5)^2 = 2.25
    paper = Mca(1, 8, Pattern.NONCAUSAL_CROSS, alpha=1.1, reproduce_paper=True)
    assert counted(paper, weights, valid) == [[[3.0, 6.0, 0.0, 0.0]]]
    two_heads = torch.cat([weights, weights.flip(-1)], 1)
    assert counted(Mca(2, 8, Pattern.NONCAUSAL_CROSS), two_heads, Call()) == [[[4.0, 6.0, 6.0, 4.0]]]


def test_a_layer_saves_less_than_a_quarter_even_if_values_cost_nothing() -> None:
    inputs = with_source(n=12, d=24)
    fractions = mca(alpha=1e6).measure_fractions(inputs.q, inputs.k, inputs.v, Call(source=inputs.source))
    assert_close(fractions.valid, torch.tensor(1 / 24).double())
    saved = (1 - 1 / 24) / (4 + 2 * 12 / 24)
    assert_close(fractions.layer, torch.tensor(1 - saved).double())


def test_causal_patterns_need_a_word() -> None:
    with pytest.raises(ValueError, match="does not support causal_self"):
        mca(Pattern.CAUSAL_SELF)
    mechanism = mca(Pattern.CAUSAL_SELF, allow_noncausal_budget=True, alpha=1e-5)
    inputs = draw(mechanism)
    assert_close(attend(mechanism, inputs).out, softmax_attention(mechanism, inputs, Call())["out"])


def test_a_call_that_does_not_say_what_values_were_projected_from_is_refused() -> None:
    inputs = with_source()
    with pytest.raises(ValueError, match=r"needs Call\.source"):
        mca()(inputs.q, inputs.k, inputs.v, Call())


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"alpha": -1.0}, "alpha must be a finite number, at least 0"),
        ({"alpha": math.inf}, "alpha must be a finite number"),
        ({"sampling": {"distribution": "gamma"}}, "sampling.distribution must be one of multinomial, poisson"),
        ({"path": "gather"}, "path=gather needs sampling.draws=shared"),
    ],
    ids=str,
)
def test_hyperparameters_out_of_range_are_refused(wrong: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        mca(**wrong)
