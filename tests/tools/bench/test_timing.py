"""The stop-watch: in turn, medians, at least three, and no longer than asked."""

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.tools.bench.small import job, scene
from thresher.tools.bench import memory
from thresher.tools.bench.measure import measure_attention, summarise_times
from thresher.tools.bench.timing import AT_LEAST, compute_spread, time_interleaved


def ticking(step: float) -> Callable[[], float]:
    def ticks() -> Iterator[float]:
        now = 0.0
        while True:
            yield now
            now += step

    return ticks().__next__


def passes(called: list[str]) -> dict[str, Callable[[], tuple[float]]]:
    def one(name: str) -> Callable[[], tuple[float]]:
        def run() -> tuple[float]:
            called.append(name)
            return (float(len(called)),)

        return run

    return {name: one(name) for name in "ab"}


def test_contenders_take_turns_and_the_order_reverses() -> None:
    called: list[str] = []
    recorded = time_interleaved(passes(called), 3, 60)
    assert "".join(called) == "ab" + "ab" + "ba" + "ab"
    assert recorded == {"a": [(3,), (6,), (7,)], "b": [(4,), (5,), (8,)]}


def test_time_ends_repetitions_but_three_are_made() -> None:
    assert len(time_interleaved(passes([]), 50, 10.0, ticking(100.0))["a"]) == AT_LEAST
    assert len(time_interleaved(passes([]), 50, 10.0, ticking(1.0))["a"]) in range(10, 16)
    assert len(time_interleaved(passes([]), 2, 10.0, ticking(1.0))["a"]) == 2


def test_median_and_quartiles_are_in_milliseconds() -> None:
    assert compute_spread([0.005, 0.001, 0.002, 0.003, 0.004]) == pytest.approx((3, 2, 4))
    assert compute_spread([0.002]) == pytest.approx((2, 2, 2))


def test_speed_ups_divide_medians_of_the_same_repetitions() -> None:
    row = summarise_times(
        {
            ("", "forward"): [(0.001,), (0.002,), (0.5,)],
            ("dense_", "forward"): [(0.004,), (0.004,), (0.004,)],
            ("", "training"): [(0.001, 0.003), (0.001, 0.003), (0.9, 0.9)],
            ("dense_", "training"): [(0.003, 0.009), (0.003, 0.009), (0.003, 0.009)],
        }
    )
    assert row["fwd_ms"] == pytest.approx(2)  # one slow repetition is no median
    assert row["bwd_ms"] == pytest.approx(3)
    assert row["speedup_fwd"] == pytest.approx(2)
    assert row["speedup_fwd_bwd"] == pytest.approx(3)
    assert row["repetitions"] == 3


@pytest.mark.skipif(not memory.can_reset("cpu"), reason="this system's peak of memory cannot be reset")
@pytest.mark.parametrize("mib", [32, 96])
def test_peak_memory_is_what_a_call_needs_beyond_what_was_there(mib: int) -> None:
    kept = torch.ones(mib * 2**18)  # was there before
    assert memory.measure_growth(lambda: torch.ones(mib * 2**18).sum(), "cpu") == pytest.approx(mib, rel=0.1, abs=4)
    assert memory.measure_growth(lambda: kept.sum(), "cpu") < 4


@pytest.mark.skipif(not memory.can_reset("cpu"), reason="this system's peak of memory cannot be reset")
def test_a_call_cannot_hide_in_memory_that_was_freed_before() -> None:
    def call() -> None:
        [torch.ones(2**16) for _ in range(200)]  # small blocks stay with the allocator when they are freed

    call()
    assert memory.measure_growth(call, "cpu") > 30


def test_a_row_holds_every_number() -> None:
    row = measure_attention(job("latte", 64, kept=0.25), scene())
    assert row["kept"] == pytest.approx(0.25, abs=0.03)
    assert 0 < row["rel_error"] < 1
    assert row["mac_ratio"] < 1
    for name in ("fwd_ms", "bwd_ms", "dense_fwd_ms", "dense_bwd_ms", "speedup_fwd", "speedup_fwd_bwd"):
        assert row[name] > 0
    assert {"peak_mb", "dense_peak_mb"} <= row.keys() or not memory.can_reset("cpu")


def test_dense_is_as_near_to_dense_as_rounding_allows_and_costs_the_same() -> None:
    row = measure_attention(job("dense", 64), scene(backward=False, memory=False))
    assert row["rel_error"] < 1e-6
    assert row["kept"] == row["mac_ratio"] == 1
    assert "bwd_ms" not in row


def test_training_is_timed_with_the_gradients_of_thresholds_and_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    from thresher.tools.bench.contenders import build_mechanism_contender
    from thresher.tools.bench.timing import Clock

    asked: list[tuple[int, int]] = []
    grad = torch.autograd.grad

    def note(outputs: list[torch.Tensor], inputs: list[torch.Tensor], *rest: object, **more: object) -> object:
        asked.append((len(outputs), len(inputs)))
        return grad(outputs, inputs, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.autograd, "grad", note)
    contender, dense, inputs = build_mechanism_contender(job("latte", 32, kept=0.5), scene())
    gradient = torch.randn_like(inputs.v)
    contender.training(inputs, gradient, Clock("cpu"))
    dense.training(inputs, gradient, Clock("cpu"))
    assert asked == [(2, 5), (1, 3)]  # output and cost for q, k, v, thresholds and tails; the output for q, k, v
