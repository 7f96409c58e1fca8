"""LATTE's kernel computes what PyTorch computes: the same keys kept, the same outputs within rounding."""

import pytest
import torch
from torch import Tensor

from tests.kernels.tails import WITHOUT, draw_tail
from tests.kernels.threads import with_threads
from thresher.attention import Attended, Call, Pattern
from thresher.attention.latte.mechanism import Latte, kernel
from thresher.kernels.build import can_use
from thresher.testing.checks import check_compiled_equals_eager
from thresher.testing.inputs import Inputs, attend, draw, gradients, noise_like, padded

pytestmark = pytest.mark.skipif(not can_use("latte"), reason="there is no C++ compiler that builds the kernel")


def pair(pattern: Pattern = Pattern.NONCAUSAL_SELF, head_dim: int = 20, **settings: object) -> tuple[Latte, Latte]:
    """Return the kernel and PyTorch, both in evaluation."""
    settings = {"threshold": 0.8137, "tail": "none"} | settings
    return (
        Latte(2, head_dim, pattern, backend="cpu", **settings).eval(),  # type: ignore[arg-type]
        Latte(2, head_dim, pattern, backend="reference", **settings).eval(),  # type: ignore[arg-type]
    )


def assert_same_costs(one: Attended, other: Attended) -> None:
    for name, part in one.cost._asdict().items():
        assert torch.equal(part.double(), getattr(other.cost, name).double()), name


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("unit", ["nats", "spread"])
@pytest.mark.parametrize("est_bits", [2, 4, 8])
@pytest.mark.parametrize("split", ["round", "truncate"])
@torch.no_grad()
def test_outputs_and_costs_are_those_of_pytorch(pattern: Pattern, unit: str, est_bits: int, split: str) -> None:
    ours, plain = pair(pattern, unit=unit, estimate={"bits": est_bits, "split": split}, always_keep=2)
    n, m = (61, 133) if pattern.cross else (133, 133)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        inputs = draw(ours, lengths=(n, m), value_dim=11, groups=1, dtype=dtype)
        for call in (Call(), padded(pattern, lengths=(n, m)), padded(pattern, lengths=(n, m), left=True)):
            one, other = attend(ours, inputs, call), attend(plain, inputs, call)
            torch.testing.assert_close(one.out, other.out, rtol=tolerance, atol=tolerance)
            assert_same_costs(one, other)
            assert 0 < one.cost.kept.sum() < one.cost.visible.sum()


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@torch.no_grad()
def test_rounding_is_within_twice_that_of_pytorch(pattern: Pattern, spread: float) -> None:
    ours, plain = pair(pattern, 64)
    inputs = draw(ours, lengths=(300, 300), dtype=torch.float32, spread=spread)
    exact = attend(plain, Inputs(*(x.double() for x in (inputs.q, inputs.k, inputs.v))))

    def error(mechanism: Latte) -> Tensor:
        return (attend(mechanism, inputs).out.double() - exact.out).norm()

    assert error(ours) <= 2 * error(plain)


@pytest.mark.parametrize("pattern", Pattern)
@torch.no_grad()
def test_results_do_not_depend_on_the_number_of_threads(pattern: Pattern) -> None:
    ours, _ = pair(pattern, 40)
    inputs = draw(ours, lengths=(300, 300), dtype=torch.float32)
    found = with_threads(lambda: attend(ours, inputs))
    for other in found[1:]:
        assert torch.equal(found[0].out, other.out)
        assert_same_costs(found[0], other)


@pytest.mark.parametrize("pattern", Pattern)
@torch.no_grad()
def test_strided_empty_huge_and_broken_inputs(pattern: Pattern) -> None:
    ours, plain = pair(pattern)
    inputs = draw(ours, lengths=(50, 50), dtype=torch.float32)
    strided = Inputs(*(x.mT.contiguous().mT for x in (inputs.q, inputs.k, inputs.v)))
    assert torch.equal(attend(ours, strided).out, attend(ours, inputs).out)
    for size in (1e-12, 1e12):
        scaled = Inputs(inputs.q * size, inputs.k * size, inputs.v * size)
        one, other = attend(ours, scaled), attend(plain, scaled)
        torch.testing.assert_close(one.out, other.out)
        assert_same_costs(one, other)
    nobody = Inputs(*(x[:0] for x in (inputs.q, inputs.k, inputs.v)))
    assert attend(ours, nobody).out.shape == (0, 2, 50, 20)
    half = Inputs(*(x.bfloat16() for x in (inputs.q, inputs.k, inputs.v)))
    torch.testing.assert_close(attend(ours, half).out, attend(plain, half).out, atol=0.02, rtol=0.02)
    for broken in (float("nan"), float("inf")):
        for x in (inputs.q, inputs.k):
            x[0, 0, 3] = broken
            one, other = attend(ours, inputs), attend(plain, inputs)
            torch.testing.assert_close(one.out, other.out, equal_nan=True)
            assert_same_costs(one, other)
            x[0, 0, 3] = 1.0


TRAINED = {"gate": {"surrogate": "compact", "tau": 0.07}}
INSIDE = {"gate": {"surrogate": "inside", "tau": 0.07}}


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("unit", ["nats", "spread"])
@pytest.mark.parametrize("est_bits", [4, 8])
@pytest.mark.parametrize(
    "settings",
    [
        TRAINED,
        INSIDE,
        {"gate": INSIDE["gate"] | {"into_scores": False}},
        {"gate": TRAINED["gate"] | {"into_scores": False}},
        {"gate": {"mode": "hard"}},
        TRAINED | {"tail": "mean"},
        INSIDE | {"tail": "mean"},
    ],
    ids=str,
)
def test_gradients_are_those_of_pytorch(
    pattern: Pattern, unit: str, est_bits: int, settings: dict[str, object]
) -> None:
    """The budget's gradient, which every pair near the threshold has a part in, too."""
    ours, plain = pair(pattern, unit=unit, estimate={"bits": est_bits}, always_keep=1, **settings)
    ours.train(), plain.train()
    n, m = (61, 300) if pattern.cross else (300, 300)
    inputs = draw(ours, lengths=(n, m), value_dim=11, groups=1)
    for call in (Call(), padded(pattern, lengths=(n, m)), padded(pattern, lengths=(n, m), left=True)):
        (one, found), (other, wanted) = (gradients(mechanism, inputs, call) for mechanism in (ours, plain))
        torch.testing.assert_close(one.out, other.out, rtol=1e-12, atol=1e-12)
        assert_same_costs(one, other)
        for name, reference in wanted.items():
            assert reference is not None
            assert reference.any()
            exact = 1e-6 if name in ("thresholds.offset", "tail.factor") else 1e-10
            torch.testing.assert_close(
                found[name], reference, rtol=exact, atol=exact, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_rounding_of_gradients_is_within_twice_that_of_pytorch(pattern: Pattern, spread: float) -> None:
    ours, plain = pair(pattern, 64, **TRAINED)
    ours.train(), plain.train()
    inputs = draw(ours, lengths=(300, 300), dtype=torch.float32, spread=spread)
    wide = Inputs(*(x.double() for x in (inputs.q, inputs.k, inputs.v)))
    cases = ((ours, inputs), (plain, inputs), (plain, wide))
    (_, one), (_, other), (_, exact) = (gradients(*case, cost=1e-3) for case in cases)
    for name, reference in exact.items():
        ours_off, plain_off = ((x[name].double() - reference).norm() for x in (one, other))  # type: ignore[union-attr, operator]
        in_fp32 = 1e-7 if name == "thresholds.offset" else 1e-9  # a threshold's gradient is stored in fp32
        assert ours_off <= 2 * plain_off + in_fp32 * reference.norm(), name  # type: ignore[union-attr]


@pytest.mark.parametrize(("surrogate", "reached"), [("compact", 4), ("inside", 2)])
def test_a_key_beyond_the_support_of_the_surrogate_has_no_gradient(surrogate: str, reached: int) -> None:
    """And one within it has: with the compact one though it is dropped, so that it can come back."""
    ours, _ = pair(
        unit="nats", threshold=1.0, gate={"tau": 0.1, "surrogate": surrogate}, estimate={"bits": 8}, head_dim=1
    )
    ours.train()
    k = (
        torch.tensor([1.0, 0.5, -0.1, -0.2, -0.5, -1.0], dtype=torch.float64)
        .expand(1, 2, 6)[..., None]
        .requires_grad_()
    )
    q, v = torch.ones(1, 2, 1, 1, dtype=torch.float64), noise_like(torch.empty(1, 2, 6, 1, dtype=torch.float64))
    out = ours(q, k, v, Call()).out
    (into_k,) = torch.autograd.grad(out.sum(), k)
    assert (into_k[0, 0, :, 0] != 0).tolist() == [j < reached for j in range(6)]


@pytest.mark.parametrize("training", [True, False])
def test_gradients_do_not_depend_on_the_number_of_threads(training: bool) -> None:
    ours, _ = pair(head_dim=40, **TRAINED)
    ours.train(training)
    inputs = draw(ours, lengths=(700, 300), dtype=torch.float32)
    found = with_threads(lambda: gradients(ours, inputs)[1])
    for others in found[1:]:
        assert all(torch.equal(x, others[name]) for name, x in found[0].items())  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", Pattern)
def test_a_threshold_of_zero_and_of_infinity_and_rows_that_are_alike(pattern: Pattern) -> None:
    for theta in (0.0, float("inf")):
        ours, plain = pair(pattern, threshold=theta, **TRAINED)
        ours.train(), plain.train()
        for dtype, off in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
            inputs = draw(ours, lengths=(40, 40), dtype=dtype)
            inputs.k[0, 0] = inputs.k[0, 0, :1]
            inputs.q[1, 1, 3] = 0
            (one, found), (other, wanted) = (gradients(mechanism, inputs) for mechanism in (ours, plain))
            torch.testing.assert_close(one.out, other.out, rtol=off, atol=off)
            assert_same_costs(one, other)
            for name, reference in wanted.items():
                exact = max(off, 1e-6) if name == "thresholds.offset" else off
                torch.testing.assert_close(found[name], reference, rtol=exact, atol=exact)


def check_rules(q: Tensor, k: Tensor, v: Tensor, gate: kernel.Gate, tail: dict[str, Tensor | None] = WITHOUT) -> None:
    """Check attention and its gradient as torch checks operators."""
    given = {"q": q, "k": k, "v": v, "scale": 0.25, **tail, **gate._asdict()}
    torch.library.opcheck(kernel.attend, (), given)
    out, kept, row_max, row_sum, tail_weight = (x.detach() for x in kernel.attend(**given))
    bare = {name: x.detach() if isinstance(x, Tensor) else x for name, x in given.items()}
    results = {"out": out, "row_max": row_max, "row_sum": row_sum, "tail_weight": tail_weight}
    gradients = {"grad": noise_like(out), "grad_kept": torch.ones_like(kept)}
    torch.library.opcheck(kernel.back, (), gradients | results | bare)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from PyTorch itself
def test_operators_keep_the_rules_of_torch() -> None:
    q, k, v = (noise_like(torch.empty(2, 20, 8), seed=seed).requires_grad_() for seed in range(3))
    q_codes, k_codes = ((x.detach() * 2).round().clamp(-8, 7).to(torch.int8) for x in (q, k))
    hidden = torch.arange(20).expand(2, 20) > 5
    unit, threshold = torch.full((2, 20), 0.5), torch.ones(2, requires_grad=True)
    for shown, k_unit, shift, tau in ((None, unit[:, :1], None, None), (hidden, unit, 0, torch.tensor(0.2))):
        gate = kernel.Gate(
            q_codes=q_codes,
            k_codes=k_codes,
            q_unit=unit,
            k_unit=k_unit,
            shown_q=shown,
            shown_k=shown,
            threshold=threshold,
            tau=tau,
            shift=shift,
            spread=True,
            always_keep=0,
            step=256.0,
            into_scores=True,
            inside=shift is None,
        )
        torch.library.opcheck(kernel.encode, (q.detach(), shift is None, 4, False))
        for tail in (WITHOUT, draw_tail(q)):
            check_rules(q, k, v, gate, tail)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from PyTorch itself
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("pattern", [Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF])
def test_it_compiles_without_graph_breaks(pattern: Pattern) -> None:
    check_compiled_equals_eager(pair(pattern, **TRAINED)[0], backend="aot_eager")


def test_what_the_kernel_cannot_do_is_refused_or_left_to_pytorch() -> None:
    ours, plain = pair(gate={"surrogate": "sigmoid"})
    inputs = draw(ours)
    bias = Call(bias=torch.zeros(1, 1, 7, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match="no masks of pairs and no biases"):
        attend(ours, inputs, bias)
    with pytest.raises(ValueError, match="surrogate=compact"):
        attend(ours, inputs)
    with torch.no_grad(), pytest.raises(ValueError, match="exact scores"):
        attend(pair(estimate={"bits": "exact"})[0], inputs)
    ours.backend = "auto"
    for call in (bias, Call()):
        assert torch.equal(attend(ours, inputs, call).out, attend(plain, inputs, call).out)
