"""SMYRF's kernel computes PyTorch's tail: outputs, costs and gradients, that of the tail's factor included.

`tests/attention/test_smyrf_tail.py` compares both with the definition.
"""

import statistics
import time
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.clusters import assign_once
from tests.kernels.tails import WITHOUT, draw_tail
from tests.kernels.threads import with_threads
from thresher.attention import Call, Pattern
from thresher.attention.smyrf import kernel
from thresher.attention.smyrf.mechanism import Smyrf
from thresher.kernels.build import can_use
from thresher.testing.checks import check_compiled_equals_eager
from thresher.testing.inputs import Inputs, attend, count_saved_bytes, draw, first, gradients, noise_like, padded
from thresher.tools.bench.timing import time_interleaved

pytestmark = pytest.mark.skipif(not can_use("smyrf"), reason="there is no C++ compiler that builds the kernel")

SIZES = [(61, 61, 8, 8), (61, 133, 5, 19), (190, 100, 64, 64), (1, 90, 1, 3)]


def pair(
    pattern: Pattern = Pattern.NONCAUSAL_SELF, head_dim: int = 8, heads: int = 2, **hyperparameters: object
) -> tuple[Smyrf, Smyrf]:
    """Return the kernel and PyTorch, with the same hashes and a factor of its own for each head."""
    both = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        options = {"cluster": 7, "rounds": 3, "tail": "mean", "backend": backend} | hyperparameters
        both.append(Smyrf(heads, head_dim, pattern, **options).train())  # type: ignore[arg-type]
        set_factors(both[-1], torch.linspace(0.4, 1.5, heads))
    return both[0], both[1]


def without_tail(pattern: Pattern, **hyperparameters: object) -> Smyrf:
    torch.manual_seed(0)
    options = {"cluster": 7, "rounds": 3, "backend": "cpu"} | hyperparameters
    return Smyrf(2, 8, pattern, **options).train()  # type: ignore[arg-type]


def set_factors(mechanism: Smyrf, factors: Tensor) -> None:
    assert mechanism.tail is not None
    with torch.no_grad():
        mechanism.tail.factor.copy_(factors)


def assert_equal(ours: Smyrf, plain: Smyrf, inputs: Inputs, call: Call, exact: float = 1e-9) -> None:
    (one, found), (other, wanted) = (gradients(mechanism, inputs, call) for mechanism in (ours, plain))
    torch.testing.assert_close(one.out, other.out, rtol=exact, atol=exact)
    assert all(torch.equal(a, b) for a, b in zip(one.cost, other.cost, strict=True))
    for name, reference in wanted.items():
        off = max(exact, 1e-5 if name == "tail.factor" else 1e-8)  # a factor and its gradient are stored in fp32
        torch.testing.assert_close(found[name], reference, rtol=off, atol=off, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize(
    "options",
    [
        {"cluster": 7, "rounds": 3},
        {"cluster": 16, "rounds": 1},
        {"cluster": 16, "rounds": 1, "dedup": "count"},
        {"cluster": 60, "rounds": 2},
        {"cluster": 4, "rounds": 5, "quantise": True, "width": 0.5},  # equal hashes: most keys are met again
    ],
    ids=str,
)
@pytest.mark.parametrize(("n", "m", "d", "dv"), SIZES)
def test_outputs_gradients_and_costs_are_those_of_pytorch(
    pattern: Pattern, options: dict[str, object], n: int, m: int, d: int, dv: int
) -> None:
    ours, plain = pair(pattern, d, heads=4, **options)
    m = m if pattern.cross or (pattern.causal and n <= m) else n
    inputs = draw(ours, lengths=(n, m), groups=2, value_dim=dv, spread=1.5)
    calls = [Call(), Call(keys=noise_like(torch.empty(2, m), seed=5) > -0.5)]
    if pattern.cross or n == m:
        calls += [padded(pattern, lengths=(n, m)), padded(pattern, lengths=(n, m), left=True)]
        calls += [Call(queries=noise_like(torch.empty(2, n), seed=6) > -0.5)]
    for call in calls:
        assert_equal(ours, plain, inputs, call)


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_a_head_without_a_tail_still_gets_the_gradient_that_brings_it_back(pattern: Pattern, factor: float) -> None:
    ours, plain = pair(pattern)
    for mechanism in (ours, plain):
        set_factors(mechanism, torch.tensor([factor, 0.9]))
    inputs = draw(ours, lengths=(61, 61))
    assert_equal(ours, plain, inputs, Call())
    torch.testing.assert_close(attend(ours, inputs).out[:, 0], attend(without_tail(pattern), inputs).out[:, 0])
    found = gradients(ours, inputs)[1]["tail.factor"]
    assert found is not None
    assert found[1] != 0


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_row_that_drops_nothing_has_no_tail(pattern: Pattern, rounds: int) -> None:
    ours, _ = pair(pattern, cluster=4, rounds=rounds)
    inputs = draw(ours, lengths=(9, 9))
    call = Call(keys=first([4, 2], 9))
    (one, found), (other, wanted) = (
        gradients(mechanism, inputs, call) for mechanism in (ours, without_tail(pattern, cluster=4, rounds=rounds))
    )
    torch.testing.assert_close(one.out, other.out, rtol=1e-12, atol=1e-12)
    for name in "qkv":
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-12, atol=1e-12)
    factor = found["tail.factor"]
    assert factor is not None
    assert not factor.any()


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_rounding_is_within_twice_that_of_pytorch(
    pattern: Pattern, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clusters are those of fp32 in all three."""
    ours, plain = pair(pattern, 32, cluster=50)
    inputs = draw(ours, lengths=(400, 400), dtype=torch.float32, spread=spread)
    assign_once(monkeypatch)
    wide = Inputs(*(x.double() for x in (inputs.q, inputs.k, inputs.v)))
    found = []
    for mechanism, given in ((ours, inputs), (plain, inputs), (plain, wide)):
        attended, grads = gradients(mechanism, given, cost=0)
        found.append({"out": attended.out} | grads)
    for name, exact in found[2].items():
        ours_off, plain_off = ((x[name].double() - exact).norm() for x in found[:2])  # type: ignore[union-attr, operator]
        in_fp32 = 1e-6 if name == "tail.factor" else 1e-8
        assert ours_off <= 2 * plain_off + in_fp32 * exact.norm(), name  # type: ignore[union-attr]


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_dropped_keys_far_above_the_met_ones_are_no_obstacle(pattern: Pattern, rounds: int, factor: float) -> None:
    """Queries and keys in one direction: hashes of queries and keys are sorted in opposite orders by some of them."""
    ours, plain = pair(pattern, cluster=4, rounds=rounds)
    inputs = draw(ours, lengths=(48, 48), dtype=torch.float32)
    line = noise_like(torch.empty(8), seed=3)
    for size in (10.0, 30.0, 100.0):
        steep = Inputs(-size * inputs.q[..., :1].abs() * line, size * inputs.k[..., :1] * line, inputs.v)
        for mechanism in (ours, plain):
            set_factors(mechanism, torch.tensor(factor).expand(2))
        (one, found), (other, wanted) = (gradients(mechanism, steep, cost=0) for mechanism in (ours, plain))
        assert one.out.isfinite().all()
        torch.testing.assert_close(one.out, other.out, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["v"], wanted["v"], rtol=1e-3, atol=1e-3)
        assert all(each is not None and each.isfinite().all() for each in found.values())


@pytest.mark.parametrize("pattern", Pattern)
@pytest.mark.parametrize("batch", [1, 3])
def test_results_do_not_depend_on_the_number_of_threads(pattern: Pattern, batch: int) -> None:
    ours, _ = pair(pattern, 40)
    inputs = draw(ours, batch=batch, lengths=(300, 300), dtype=torch.float32)

    def compute() -> dict[str, Tensor | None]:
        attended, grads = gradients(ours, inputs)
        return {"out": attended.out, **grads}

    found = with_threads(compute)
    for others in found[1:]:
        assert all(torch.equal(x, others[name]) for name, x in found[0].items())  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", Pattern)
def test_strided_empty_huge_and_broken_inputs(pattern: Pattern) -> None:
    ours, plain = pair(pattern)
    inputs = draw(ours, lengths=(50, 50), dtype=torch.float32)
    strided = Inputs(*(x.mT.contiguous().mT for x in (inputs.q, inputs.k, inputs.v)))
    for one, other in zip(gradients(ours, strided)[1].values(), gradients(ours, inputs)[1].values(), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    huge = Inputs(inputs.q * 1e12, inputs.k * 1e12, inputs.v * 1e15)
    torch.testing.assert_close(attend(ours, huge).out, attend(plain, huge).out)
    nobody = Inputs(*(x[:0] for x in (inputs.q, inputs.k, inputs.v)))
    assert attend(ours, nobody).out.shape == (0, 2, 50, 8)
    half = Inputs(*(x.bfloat16() for x in (inputs.q, inputs.k, inputs.v)))
    torch.testing.assert_close(attend(ours, half).out, attend(plain, half).out)
    inputs.v[0, 1, 7] = float("inf")
    inputs.q[0, 0, 3] = float("nan")
    broken = attend(ours, inputs).out
    assert broken[0, 0, 3].isnan().all()
    assert broken[1].isfinite().all()
    assert torch.equal(broken.isnan(), attend(plain, inputs).out.isnan())


@pytest.mark.parametrize("pattern", [Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF])
def test_saved_memory_grows_with_the_length_not_with_its_square(pattern: Pattern) -> None:
    """And a tail adds little: two numbers of each query, and a sum of keys and of values for each block."""
    both = {
        tail: [count_saved_bytes(Smyrf(2, 64, pattern, cluster=16, tail=tail, backend="cpu"), n) for n in (512, 1024)]  # type: ignore[arg-type]
        for tail in ("none", "mean")
    }
    assert 1.8 < both["mean"][1] / both["mean"][0] < 2.3
    assert both["mean"][1] < 1.1 * both["none"][1]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from PyTorch itself
@pytest.mark.parametrize("pattern", [Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF])
def test_operators_keep_the_rules_of_torch(pattern: Pattern) -> None:
    """With one part and with several."""
    ours, _ = pair(pattern)
    inputs = draw(ours, lengths=(30, 30), dtype=torch.float32, batch=1)
    calls: list[dict[str, Any]] = []
    original = kernel.attend_in_parts
    try:
        kernel.attend_in_parts = lambda **given: calls.append(given) or original(**given)  # type: ignore
        with torch.no_grad():
            attend(ours, inputs)
    finally:
        kernel.attend_in_parts = original
    (given,) = calls
    assert (len(given["token_q"]) > 1) == pattern.causal
    for tail in (WITHOUT, draw_tail(given["q"])):
        bare = given | tail
        leaves = {name: bare[name].clone().requires_grad_() for name in ("q", "k", "v")}
        if tail["tail_factor"] is not None:
            leaves["tail_factor"] = tail["tail_factor"].clone().requires_grad_()
        torch.library.opcheck(original, (), bare | leaves)
        results = dict(zip(kernel.RESULTS, original(**bare), strict=True))
        del results["meetings"], results["repeats"]
        torch.library.opcheck(kernel.back, (), {"grad": noise_like(results["out"])} | results | bare)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from PyTorch itself
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("pattern", [Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF])
def test_it_compiles_without_graph_breaks(pattern: Pattern) -> None:
    ours, _ = pair(pattern, cluster=3)
    check_compiled_equals_eager(ours, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("n", [512, 2048])
def test_overhead(pattern: Pattern, rounds: int, n: int) -> None:
    """Processor time of one thread, with a tail and without one in turns: PyTorch takes about twice the time."""
    mechanisms = {}
    for tail in ("mean", "none"):
        torch.manual_seed(0)
        mechanisms[tail] = Smyrf(8, 64, pattern, cluster=32, rounds=rounds, tail=tail, backend="cpu").eval()  # type: ignore[arg-type]
    inputs = draw(mechanisms["none"], batch=1, lengths=(n, n), dtype=torch.float32)

    def measure(tail: str, backward: bool) -> list[float]:
        mechanism, fresh = mechanisms[tail], inputs.fresh()
        leaves = [*fresh.leaves().values(), *mechanism.parameters()]
        start = time.thread_time()
        with torch.set_grad_enabled(backward):
            out = mechanism(fresh.q, fresh.k, fresh.v, Call()).out
        if backward:
            torch.autograd.grad(out, leaves, out.detach())
        return [time.thread_time() - start]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for backward in (False, True):
            passes = {tail: partial(measure, tail, backward) for tail in mechanisms}
            times = {tail: [x for (x,) in each] for tail, each in time_interleaved(passes, 1000, 12).items()}
            middle = {tail: statistics.median(each) for tail, each in times.items()}
            ratios = [a / b for a, b in zip(times["mean"], times["none"], strict=True)]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            name = f"{pattern.name.lower()}, {rounds} rounds, {n} tokens, {'both' if backward else 'forward'}"
            taken = f"{1000 * middle['none']:.2f} ms without, {1000 * middle['mean']:.2f} with"
            print(f"{name}: {taken}, ratio {ratio:.3f} ({low:.3f} to {high:.3f}) of {len(ratios)}", flush=True)
            assert ratio < 1.6
    finally:
        torch.set_num_threads(threads)
