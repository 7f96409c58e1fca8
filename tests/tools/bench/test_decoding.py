"""Rows of one step of decoding."""

from dataclasses import replace

import pytest

from tests.tools.bench.small import job, scene
from thresher.attention.contract import Attended, Call
from thresher.attention.mechanism import Mechanism
from thresher.testing.inputs import Inputs
from thresher.tools.bench import decoding


@pytest.fixture(autouse=True)
def few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "AWAY", 2**17)


def test_a_mechanism_that_keeps_all_keys_is_dense() -> None:
    row = decoding.measure_decoding(replace(job("topk", keys=64), pattern="causal_self", model="decode"), scene())
    assert row["kept"] == 1
    assert row["rel_error"] < 1e-5
    assert row["fwd_ms"] > 0 < row["dense_fwd_ms"]
    assert "bwd_ms" not in row


def test_codes_and_sums_are_there_before_the_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    attend = decoding.attend_last

    def seen(mechanism: Mechanism, layer: Inputs, call: Call) -> Attended:
        given.append((tuple(layer.q.shape), call))
        return attend(mechanism, layer, call)

    monkeypatch.setattr(decoding, "attend_last", seen)
    row = decoding.measure_decoding(
        replace(job("latte", kept=0.25, tail="mean"), pattern="causal_self", model="decode"), scene()
    )
    assert row["kept"] == pytest.approx(0.25, abs=0.05)
    assert {shape for shape, _ in given} == {(1, 2, 1, 16)}
    assert all(call.codes is not None and call.codes.codes.shape == (1, 2, 64, 16) for _, call in given)
    assert all(call.sums is not None and call.sums.sums.values.shape == (1, 2, 16) for _, call in given)
    assert len({id(call) for _, call in given}) == 8, "layers that fill AWAY, each with its own keys"
