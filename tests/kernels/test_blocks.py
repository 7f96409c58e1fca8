"""The kernel of blocks computes what PyTorch computes: the same keys kept, the same outputs within rounding."""

from typing import Any

import pytest
import torch

from tests.kernels.tails import WITHOUT, draw_tail
from tests.kernels.threads import with_threads
from thresher.attention import Attended, Call, Pattern
from thresher.attention.blocks import Blocks, kernel
from thresher.attention.latte import Latte
from thresher.attention.latte import kernel as latte
from thresher.kernels.build import can_use
from thresher.testing.checks import check_compiled_equals_eager
from thresher.testing.inputs import Inputs, attend, cast, draw, gradients, noise_like, padded

pytestmark = pytest.mark.skipif(
    not all(map(can_use, ("blocks", "latte"))), reason="there is no C++ compiler that builds the kernels"
)

VOTING = [pattern for pattern in Pattern if not pattern.causal]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"tail": "mean", "block": {"queries": 24}},
    {"always_keep": 2, "block": {"every": 3}},
    {"always_keep": 1, "gate": {"mode": "hard"}},
    {"block": {"share": "union"}},
    {"block": {"queries": 24, "share": "union"}, "tail": "mean", "always_keep": 1},
]


def pair(pattern: Pattern = Pattern.NONCAUSAL_SELF, head_dim: int = 20, **settings: Any) -> tuple[Blocks, Blocks]:
    """Return the kernel and PyTorch, both in evaluation."""
    block = {"queries": 16} | settings.pop("block", {})
    if pattern.causal:
        block |= {"share": "union", "every": 1}
    given = {"threshold": 0.6137, "block": block} | settings
    ours, plain = (Blocks(2, head_dim, pattern, backend=b, **given) for b in ("cpu", "reference"))  # type: ignore[arg-type]
    return ours.eval(), plain.eval()


def assert_same_costs(one: Attended, other: Attended) -> None:
    for name, part in one.cost._asdict().items():
        torch.testing.assert_close(part.double(), getattr(other.cost, name).double(), rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("unit", ["nats", "spread"])
@pytest.mark.parametrize("est_bits", [2, 4, 8])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_costs_and_gradients_are_those_of_pytorch(
    pattern: Pattern, unit: str, est_bits: int, options: dict[str, Any]
) -> None:
    """The last block is not full, whole blocks are hidden by padding, and heads share keys."""
    threshold = 0.6137 if unit == "spread" else 1.5
    ours, plain = pair(pattern, unit=unit, threshold=threshold, estimate={"bits": est_bits}, **options)
    ours.train(), plain.train()
    n, m = (61, 133) if pattern.cross else (133, 133)
    inputs = draw(ours, lengths=(n, m), value_dim=11, groups=1)
    for call in (Call(), padded(pattern, lengths=(n, m)), padded(pattern, lengths=(n, m), left=True)):
        (one, found), (other, wanted) = (gradients(mechanism, inputs, call) for mechanism in (ours, plain))
        torch.testing.assert_close(one.out, other.out, rtol=1e-10, atol=1e-10)
        assert_same_costs(one, other)
        assert 0 < one.cost.kept.sum() < one.cost.visible.sum()
        for name, reference in wanted.items():
            exact = 1e-6 if name in ("thresholds.offset", "tail.factor") else 1e-9
            torch.testing.assert_close(
                found[name], reference, rtol=exact, atol=exact, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("pattern", [Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS])
@torch.no_grad()
def test_a_union_is_latte(pattern: Pattern) -> None:
    """Also where queries are the last of the keys, so that the first block lacks some."""
    ours, _ = pair(pattern, tail="mean")
    alone = Latte(2, 20, pattern, threshold=0.6137, tail="mean", backend="cpu").eval()
    for n in (61, 5, 1):
        inputs = draw(ours, lengths=(n, 133), dtype=torch.float32)
        one, other = attend(ours, inputs), attend(alone, inputs)
        torch.testing.assert_close(one.out, other.out, rtol=3e-6, atol=3e-6)
        assert torch.equal(one.cost.kept, other.cost.kept)
        plain = pair(pattern, tail="mean")[1]
        assert_same_costs(one, attend(plain, inputs))


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_rounding_is_within_twice_that_of_pytorch(pattern: Pattern, spread: float) -> None:
    """Where votes in fp32 choose the same keys as those in fp64; a vote beside the threshold may choose another."""
    ours, plain = pair(pattern, 64, block={"queries": 64})
    inputs = draw(ours, lengths=(300, 300), dtype=torch.float32, spread=spread)
    wide = Inputs(*(x.double() for x in (inputs.q, inputs.k, inputs.v)))
    (one, mine), (other, theirs), (exact, wanted) = (
        gradients(mechanism, x, cost=0) for mechanism, x in ((ours, inputs), (plain, inputs), (plain, wide))
    )
    assert (one.cost.kept.double() / exact.cost.kept.double() - 1).abs().max() < 1e-3
    if torch.equal(one.cost.kept.double(), exact.cost.kept.double()):
        assert (one.out.double() - exact.out).norm() <= 2 * (other.out.double() - exact.out).norm()
        for name in "qkv":
            off, plain_off = ((x[name].double() - wanted[name]).norm() for x in (mine, theirs))  # type: ignore[union-attr, operator]
            assert off <= 2 * plain_off, name


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(pattern: Pattern, dtype: torch.dtype) -> None:
    ours, _ = pair(pattern, 40, tail="mean")
    inputs = cast(draw(ours, lengths=(200, 300), dtype=torch.float32), dtype)
    found = with_threads(lambda: gradients(ours, inputs))
    for attended, others in found[1:]:
        assert torch.equal(found[0][0].out, attended.out)
        assert_same_costs(found[0][0], attended)
        assert all(torch.equal(x, others[name]) for name, x in found[0][1].items())  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("head_dim", [1, 20, 64, 70])
def test_bf16_is_read_as_it_is_and_rounded_once(pattern: Pattern, head_dim: int) -> None:
    ours, _ = pair(pattern, head_dim)
    half = cast(draw(ours, lengths=(133, 133), value_dim=head_dim + 3, dtype=torch.float32), torch.bfloat16)
    (one, found), (other, wanted) = (gradients(ours, x, cost=0) for x in (half, cast(half, torch.float32)))
    assert one.out.dtype is torch.bfloat16
    torch.testing.assert_close(one.out.float(), other.out, rtol=2**-8, atol=1e-5)
    assert_same_costs(one, other)
    for name in "qkv":
        x, reference = found[name], wanted[name]
        assert x is not None
        assert reference is not None
        assert (x.double() - reference.double()).norm() < 2**-7 * reference.double().norm(), name


@pytest.mark.parametrize("pattern", Pattern)
@torch.no_grad()
def test_strided_empty_huge_and_broken_inputs(pattern: Pattern) -> None:
    ours, plain = pair(pattern)
    inputs = draw(ours, lengths=(50, 50), dtype=torch.float64)
    strided = Inputs(*(x.mT.contiguous().mT for x in (inputs.q, inputs.k, inputs.v)))
    assert torch.equal(attend(ours, strided).out, attend(ours, inputs).out)
    for size in (1e-12, 1e12):
        scaled = Inputs(inputs.q * size, inputs.k * size, inputs.v * size)
        one, other = attend(ours, scaled), attend(plain, scaled)
        torch.testing.assert_close(one.out, other.out)
        assert_same_costs(one, other)
    nobody = Inputs(*(x[:0] for x in (inputs.q, inputs.k, inputs.v)))
    assert attend(ours, nobody).out.shape == (0, 2, 50, 20)
    for broken in (float("nan"), float("inf")):
        for x in (inputs.q, inputs.k, inputs.v):
            x[0, 0, 3] = broken
            one, other = attend(ours, inputs), attend(plain, inputs)
            torch.testing.assert_close(one.out, other.out, equal_nan=True)
            assert_same_costs(one, other)
            x[0, 0, 3] = 1.0


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("theta", [0.0, float("inf")])
def test_a_threshold_of_zero_and_of_infinity_and_rows_that_are_alike(pattern: Pattern, theta: float) -> None:
    ours, plain = pair(pattern, threshold=theta, tail="mean")
    inputs = draw(ours, lengths=(40, 40))
    inputs.q[0, 0, :20] = 0
    (one, found), (other, wanted) = (gradients(mechanism, inputs) for mechanism in (ours, plain))
    torch.testing.assert_close(one.out, other.out, rtol=1e-10, atol=1e-10)
    assert_same_costs(one, other)
    for name, reference in wanted.items():
        torch.testing.assert_close(found[name], reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("queries", [1, 7, 64, 128])
@pytest.mark.parametrize("pattern", Pattern)
def test_blocks_of_every_size(pattern: Pattern, queries: int) -> None:
    """One query alone, sizes that no vector divides, and a block that is longer than the sequence."""
    ours, plain = pair(pattern, 7, block={"queries": queries}, unit="nats", threshold=1.5)
    inputs = draw(ours, lengths=(70, 70), value_dim=5)
    (one, found), (other, wanted) = (gradients(mechanism, inputs) for mechanism in (ours, plain))
    torch.testing.assert_close(one.out, other.out, rtol=1e-10, atol=1e-10)
    assert_same_costs(one, other)
    for name in "qkv":
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", VOTING)
@torch.no_grad()
def test_many_keys_go_through_caches_in_parts(pattern: Pattern) -> None:
    """Products of few voters at a time, and weights of few rows: the same as with room for all."""
    ours, plain = pair(pattern, 4, block={"queries": 64}, estimate={"bits": 8}, threshold=1.2)
    inputs = draw(ours, lengths=(70, 9000), value_dim=3)
    one, other = attend(ours, inputs), attend(plain, inputs)
    torch.testing.assert_close(one.out, other.out, rtol=1e-10, atol=1e-10)
    assert_same_costs(one, other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from PyTorch itself
@pytest.mark.parametrize("votes", [True, False])
def test_operators_keep_the_rules_of_torch(votes: bool) -> None:
    q, k, v = (noise_like(torch.empty(2, 20, 6), seed=seed).requires_grad_() for seed in range(3))
    (q_codes, q_unit), (k_codes, k_unit) = (
        latte.encode(x.detach(), per_token, 4, False) for x, per_token in ((q, True), (k, not votes))
    )
    hidden = torch.arange(20).expand(2, 20) > 5
    chosen = latte.Gate(
        q_codes=q_codes,
        k_codes=k_codes,
        q_unit=q_unit,
        k_unit=k_unit,
        shown_q=hidden,
        shown_k=hidden,
        threshold=torch.ones(2, requires_grad=True),
        tau=torch.tensor(0.2),
        shift=None if votes else 0,
        spread=True,
        always_keep=1,
        step=256.0,
        into_scores=False,
        inside=True,
    )
    sharing = kernel.Sharing(size=8, votes=votes, every=1)
    for tail in (WITHOUT, draw_tail(q)):
        given = {"q": q, "k": k, "v": v, "scale": 0.25, **tail, **chosen._asdict(), **sharing._asdict()}
        torch.library.opcheck(kernel.attend, (), given)
        found = kernel.Attention(*(x.detach() for x in kernel.attend(**given)))
        bare = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        results = found._asdict()
        grads = {"grad": noise_like(results["out"]), "grad_kept": torch.ones_like(results["kept"])}
        for name in ("kept", "of_rows", "computed"):
            del results[name]
        torch.library.opcheck(kernel.back, (), grads | results | bare)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from PyTorch itself
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("pattern", [Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF])
def test_it_compiles_without_graph_breaks(pattern: Pattern) -> None:
    check_compiled_equals_eager(pair(pattern)[0], backend="aot_eager")


def test_what_the_kernel_cannot_do_is_refused_or_left_to_pytorch() -> None:
    ours, plain = pair()
    inputs = draw(ours)
    bias = Call(bias=torch.zeros(1, 1, 7, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match="no masks of pairs and no biases"):
        attend(ours, inputs, bias)
    with pytest.raises(ValueError, match=r"gate\.surrogate=inside"):
        attend(pair(gate={"surrogate": "compact"})[0], inputs)
    with pytest.raises(ValueError, match=r"gate\.into_scores=false"):
        attend(pair(gate={"into_scores": True})[0], inputs)
    with torch.no_grad():
        attend(pair(gate={"surrogate": "compact", "into_scores": True})[0], inputs)
        with pytest.raises(ValueError, match="exact scores"):
            attend(pair(estimate={"bits": "exact"})[0], inputs)
    dropping = pair()[0].train()
    dropping.dropout = 0.5
    with pytest.raises(ValueError, match="dropout"):
        attend(dropping, inputs)
    ours.backend = "auto"
    assert torch.equal(attend(ours, inputs, bias).out, attend(plain, inputs, bias).out)
