"""Kernels that read bf16 as it is compute what they compute of the same numbers in fp32; LATTE has its own tests."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.kernels.tails import WITHOUT, draw_tail
from tests.kernels.threads import check_threads
from thresher.attention import Call, Mechanism, Pattern
from thresher.attention.latte.mechanism import Latte
from thresher.attention.smyrf import kernel as smyrf
from thresher.attention.smyrf.mechanism import Smyrf
from thresher.attention.topk import kernel as topk
from thresher.attention.topk.mechanism import TopK
from thresher.kernels.build import can_use
from thresher.testing.inputs import Inputs, attend, cast, draw, gradients, noise_like, padded

pytestmark = pytest.mark.skipif(
    not all(map(can_use, ("latte", "smyrf", "topk"))), reason="there is no C++ compiler that builds the kernels"
)

DIMS = [1, 20, 33, 64, 70, 130]  # a half pair alone or at the end, whole vectors of pairs, and a rest of them
ROUNDED = 2**-8  # of a number that becomes bf16
NAMES = ["smyrf", "smyrf with a tail", "topk"]


def made(name: str, pattern: Pattern = Pattern.NONCAUSAL_SELF, head_dim: int = 64, backend: str = "cpu") -> Mechanism:
    """Return a mechanism, with the same hashes each time."""
    torch.manual_seed(0)
    of: dict[str, Mechanism] = {
        "latte": Latte(2, head_dim, pattern, threshold=1.0, gate={"surrogate": "inside"}, backend=backend),  # type: ignore[arg-type]
        "smyrf": Smyrf(2, head_dim, pattern, cluster=17, rounds=2, backend=backend),  # type: ignore[arg-type]
        "smyrf with a tail": Smyrf(2, head_dim, pattern, cluster=17, rounds=2, tail="mean", backend=backend),  # type: ignore[arg-type]
        "topk": TopK(2, head_dim, pattern, keys=24, backend=backend),  # type: ignore[arg-type]
    }
    return of[name].eval()


def drawn(mechanism: Mechanism, n: int, m: int, value_dim: int | None = None) -> Inputs:
    """Draw inputs in bf16 whose scores are exact in fp32, in whatever order they are summed: the same keys are kept."""
    inputs = draw(mechanism, lengths=(n, m), value_dim=value_dim, dtype=torch.float32)
    return cast(Inputs((2 * inputs.q).round() / 2, (2 * inputs.k).round() / 2, inputs.v), torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("n", [9, 133])
@torch.no_grad()
def test_outputs_are_those_of_fp32_and_rounded_once(name: str, pattern: Pattern, head_dim: int, n: int) -> None:
    ours = made(name, pattern, head_dim)
    m = 133 if pattern.cross else n
    half = drawn(ours, n, m, value_dim=head_dim + 3)
    for call in (Call(), padded(pattern, lengths=(n, m)), padded(pattern, lengths=(n, m), left=True)):
        one, other = attend(ours, half, call), attend(ours, cast(half, torch.float32), call)
        assert one.out.dtype is torch.bfloat16
        torch.testing.assert_close(one.out.float(), other.out, rtol=ROUNDED, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(one.cost, other.cost, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("head_dim", DIMS)
def test_gradients_are_those_of_fp32_and_rounded_once(name: str, pattern: Pattern, head_dim: int) -> None:
    ours = made(name, pattern, head_dim).train()
    half = drawn(ours, 133, 133)
    (_, found), (_, wanted) = (gradients(ours, x) for x in (half, cast(half, torch.float32)))
    for leaf in "qkv":
        one, other = found[leaf], wanted[leaf]
        assert isinstance(one, Tensor)
        assert isinstance(other, Tensor)
        assert one.dtype is torch.bfloat16
        # The gradient of the output is rounded, too.
        assert (one.double() - other.double()).norm() < 2 * ROUNDED * other.double().norm(), leaf


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@torch.no_grad()
def test_rounding_is_within_twice_that_of_pytorch(name: str, spread: float) -> None:
    ours, plain = made(name), made(name, backend="reference")
    half = cast(draw(ours, lengths=(300, 300), dtype=torch.float32, spread=spread), torch.bfloat16)
    exact = attend(plain, cast(half, torch.float32)).out.double()  # what is rounded to fp32 is no part of this
    ours_off, plain_off = ((attend(x, half).out.double() - exact).norm() for x in (ours, plain))
    assert ours_off <= 2 * plain_off


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("n", [5, 60])
def test_whole_scores_are_exact_so_that_the_same_keys_are_kept(head_dim: int, n: int) -> None:
    q, k, v = (noise_like(torch.empty(2, size, head_dim), size=3.0, seed=size).round() for size in (n, 77, 78))
    given = (1.0, None, torch.full((2, n), 20), 20, None, None)
    whole = topk.attend(q, k, v[:, :77], *given)
    half = topk.attend(q.bfloat16(), k.bfloat16(), v[:, :77].bfloat16(), *given)
    assert torch.equal(half[2], whole[2])
    for one, other in zip(half, whole, strict=True):
        assert one.dtype is other.dtype
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [5, 64])
@pytest.mark.parametrize("n", [9, 50])
@torch.no_grad()
def test_broken_rows_stay_alone_and_strides_do_not_matter(name: str, head_dim: int, n: int) -> None:
    """The last number of an odd row has no neighbour: it is not paired with the first one of the next row."""
    ours = made(name, Pattern.NONCAUSAL_CROSS, head_dim)
    inputs = cast(draw(ours, lengths=(n, 50), dtype=torch.float32), torch.bfloat16)
    strided = Inputs(*(x.mT.contiguous().mT for x in (inputs.q, inputs.k, inputs.v)))
    sound = attend(ours, inputs).out
    assert torch.equal(attend(ours, strided).out, sound)
    inputs.q[0, 0, 3] = float("nan")
    broken = attend(ours, inputs).out
    assert broken[0, 0, 3].isnan().all()
    if name == "topk":  # clusters of the others change
        broken[0, 0, 3] = sound[0, 0, 3]
        assert torch.equal(broken, sound)
    assert torch.equal(broken[1], sound[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [9, 150])
def test_results_do_not_depend_on_the_number_of_threads(name: str, n: int) -> None:
    ours = made(name, Pattern.CAUSAL_SELF, 40).train()
    inputs = cast(draw(ours, lengths=(n, n), dtype=torch.float32), torch.bfloat16)
    check_threads(ours, inputs)


@pytest.mark.parametrize("name", [*NAMES, "latte"])
@pytest.mark.parametrize("other", [torch.float32, torch.float16])
def test_types_that_differ_are_read_as_one(name: str, other: torch.dtype) -> None:
    """Under autocast a norm of queries and keys leaves them in fp32 beside values in bf16."""
    ours = made(name)
    wide = draw(ours, lengths=(40, 40), dtype=torch.float32)
    mixed = Inputs(wide.q.to(other), wide.k.to(other), wide.v.bfloat16())
    attended, grads = gradients(ours, mixed)
    alike, wanted = gradients(ours, cast(mixed, torch.float32))
    assert attended.out.dtype is torch.bfloat16
    torch.testing.assert_close(attended.out.float(), alike.out, rtol=ROUNDED, atol=1e-5)
    for leaf, x in zip("qkv", (mixed.q, mixed.k, mixed.v), strict=True):
        one, reference = grads[leaf], wanted[leaf]
        assert one is not None
        assert reference is not None
        assert one.dtype is x.dtype
        assert (one.double() - reference.double()).norm() < 2 * ROUNDED * reference.double().norm()
    with pytest.raises(ValueError, match=r"some of its tensors are torch\.float64, others are not"):
        attend(ours, Inputs(wide.q.double(), wide.k, wide.v))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from PyTorch itself
def test_operators_keep_the_rules_of_torch() -> None:
    q, k, v = (noise_like(torch.empty(2, 20, 7), seed=seed).bfloat16().requires_grad_() for seed in range(3))
    limit = torch.full((2, 20), 5)
    torch.library.opcheck(topk.attend, (q, k, v, 0.5, None, limit, 5, None, None))
    bare = [x.detach() for x in (q, k, v)]
    out, weight, index, tail_weight = topk.attend(*bare, 0.5, None, limit, 5, None, None)
    torch.library.opcheck(topk.back, (noise_like(out), *bare, 0.5, None, None, weight, index, tail_weight, None, None))
    token = torch.arange(20).expand(2, 20)
    of = torch.arange(20).div(10, rounding_mode="floor").expand(1, 2, 20)
    slots = token.unflatten(1, (2, 10))
    part = smyrf.Part(
        slots, slots, tile_cluster=token.new_empty(0), query_cluster=of, key_cluster=of, causal=False, times=1
    )
    for tail in (WITHOUT, draw_tail(q)):
        given = {"q": q, "k": k, "v": v, "shift": 0, **tail, **{name: [x] for name, x in part._asdict().items()}}
        torch.library.opcheck(smyrf.attend_in_parts, (), given)
        given = {name: x.detach() if isinstance(x, Tensor) else x for name, x in given.items()}
        results = dict(zip(smyrf.RESULTS, smyrf.attend_in_parts(**given), strict=True))
        del results["meetings"], results["repeats"]
        torch.library.opcheck(smyrf.back, (), {"grad": noise_like(results["out"])} | results | given)


@pytest.mark.slow
def test_pairs_are_right_where_there_is_no_instruction_for_them() -> None:
    """Elsewhere kernels make numbers of bf16; this build makes pairs, so that their layout is tested everywhere."""
    flags = f"{os.environ.get('THRESHER_CXXFLAGS', '')} -DTHRESHER_PAIRS"
    tests = [__file__, "-k", "outputs or whole or broken or gradients", "-m", "not slow", "-n0", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests],
        env=os.environ | {"THRESHER_CXXFLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout  # as they are where this build fails
