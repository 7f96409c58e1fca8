"""What is attended to: random with a controlled share kept, or recorded from a trained network."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.running import CONF, tiny_config
from tests.tools.bench.small import job, options, scene
from thresher.attention import Call, Mechanism, Pattern
from thresher.attention.latte.mechanism import Latte
from thresher.run import train as training
from thresher.tools.bench import inputs as module
from thresher.tools.bench.inputs import attend_densely, draw_inputs, load_inputs, set_thresholds
from thresher.tools.bench.jobs import build_mechanism
from thresher.tools.bench.measure import measure_attention
from thresher.tools.bench.recording import choose_longest, join_layers, record_calls, record_inputs
from thresher.tools.bench.rows import build_attention_jobs


@pytest.mark.parametrize("pattern", [p.name.lower() for p in Pattern])
@pytest.mark.parametrize("kept", [0.1, 0.5])
def test_thresholds_keep_the_share_that_is_asked_for(pattern: str, kept: float) -> None:
    row = job("latte", 128, pattern, kept)
    mechanism, made = build_mechanism(row, 2, 16), load_inputs(row, scene())
    set_thresholds(mechanism, row, scene(), made)
    cost = mechanism(made.q, made.k, made.v, Call()).cost
    assert float((cost.kept.sum() / cost.visible.sum()).detach()) == pytest.approx(kept, abs=0.01)


@pytest.mark.parametrize("pattern", ["noncausal_self", "causal_self"])
def test_a_sample_of_queries_calibrates_as_well(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLED_PAIRS", 2 * 256 * 32)  # 32 queries of 256
    row = job("latte", 256, pattern, 0.2)
    mechanism, made = build_mechanism(row, 2, 16), load_inputs(row, scene())
    set_thresholds(mechanism, row, scene(), made)
    cost = mechanism(made.q, made.k, made.v, Call()).cost
    assert float((cost.kept.sum() / cost.visible.sum()).detach()) == pytest.approx(0.2, abs=0.02)


def test_a_share_for_what_has_no_thresholds_is_an_error() -> None:
    row = job("topk", 32, kept=0.5)
    with pytest.raises(ValueError, match="topk has no thresholds"):
        set_thresholds(build_mechanism(row, 2, 16), row, scene(), load_inputs(row, scene()))


def test_every_contender_gets_the_same_inputs() -> None:
    one, other = load_inputs(job("topk", 32), scene()), load_inputs(job("latte", 32), scene())
    assert all(torch.equal(a, b) for a, b in zip(one.leaves().values(), other.leaves().values(), strict=True))


@pytest.mark.parametrize("with_source", [False, True])
def test_the_baseline_is_softmax_attention_of_the_same_work(with_source: bool) -> None:
    made = draw_inputs(scene(dtype="float64"), 16, 1, 2, with_source).fresh()
    weights = (made.q @ made.k.transpose(-2, -1) / 4).softmax(-1)
    assert torch.allclose(attend_densely(Pattern.NONCAUSAL_SELF, made), weights @ made.v)
    assert all(x.is_leaf and x.requires_grad for x in made.leaves().values())
    attend_densely(Pattern.NONCAUSAL_SELF, made).sum().backward()
    assert all(x.grad is not None for x in made.leaves().values())
    if with_source:
        assert made.source is not None
        assert torch.equal(made.first(4).source.x, made.source.x[:, :4])  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    training.train(tiny_config(folder, "compute.target=0.5", "trainer.max_epochs=1", "callbacks.watch.moved=0"))
    return folder / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="module")
def recorded(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    file = tmp_path_factory.mktemp("recorded") / "inputs.pt"
    return file, record_inputs(trained, CONF, file, 3, seed=0)


def test_all_layers_of_a_trained_network_stand_beside_each_other(recorded: tuple[Path, dict[str, Any]]) -> None:
    file, found = recorded
    assert found["attention"]["_target_"] == "thresher.attention.latte.Latte"
    ((pattern, shape),) = found["shapes"].items()
    assert pattern == "noncausal_self"
    assert shape[:2] == (3, 4)  # examples; two layers of two heads
    assert found["lengths"] == {pattern: shape[2]}
    stored = torch.load(file, weights_only=True)[pattern]
    assert stored["thresholds"]["offset"].shape == (4,)
    assert not torch.equal(stored["q"][:, :2], stored["q"][:, 2:])


def test_recorded_rows_are_measured_with_trained_thresholds_or_calibrated_ones(
    recorded: tuple[Path, dict[str, Any]],
) -> None:
    file, found = recorded
    (batch, heads, n, head_dim) = found["shapes"]["noncausal_self"]
    own = scene(
        inputs=str(file), batch=batch, heads=heads, head_dim=head_dim, backward=False, memory=False, repetitions=1
    )
    cfg = options("mechanisms=[latte,topk]", "settings.latte.kept=[null,0.1]", "settings.topk.keys=8")
    trained, calibrated, topk = build_attention_jobs(cfg, CONF, own, found)
    assert {row.n for row in (trained, calibrated, topk)} == {n}
    assert measure_attention(calibrated, own)["kept"] == pytest.approx(0.1, abs=0.02)
    assert measure_attention(topk, own)["kept"] == pytest.approx(8 / n)
    thresholds = torch.load(file, weights_only=True)["noncausal_self"]["thresholds"]
    mechanism = build_mechanism(trained, heads, head_dim)
    set_thresholds(mechanism, trained, own, load_inputs(trained, own))
    assert isinstance(mechanism, Latte)
    assert torch.equal(mechanism.thresholds.base, thresholds["base"])
    with pytest.raises(ValueError, match="cropped but never repeated"):
        build_attention_jobs(options(f"n={n + 1}", "mechanisms=topk"), CONF, own, found)
    with pytest.raises(ValueError, match="which is not recorded"):
        load_inputs(job("mca", 8), own, with_source=True)


class Layer(torch.nn.Module):
    def __init__(self, mechanism: Mechanism) -> None:
        super().__init__()
        self.mechanism = mechanism

    def forward(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        return self.mechanism(x, x, x, call).out


def heard(call: Call, batch: int = 3) -> Any:
    layer = Layer(build_mechanism(job("topk", keys=1.0), 2, 16))
    return record_calls(layer, lambda: layer(torch.randn(batch, 2, 6, 16), call))


def test_padding_is_cropped_and_the_longest_examples_are_chosen() -> None:
    seen = torch.arange(6) < torch.tensor([[2], [6], [4]])
    found = join_layers(heard(Call(queries=seen, keys=seen)), 2)
    assert found["q"].shape == (2, 2, 4, 16)
    chosen, n = choose_longest(seen, torch.empty(3, 2, 6, 16), 2)
    assert (chosen.tolist(), n) == ([1, 2], 4)


def test_what_a_plain_call_cannot_stand_for_is_refused() -> None:
    with pytest.raises(ValueError, match="pair masks or biases"):
        join_layers(heard(Call(bias=torch.zeros(1, 1, 6, 6))), 1)
    left = torch.arange(6) >= torch.tensor([[2], [0], [0]])
    with pytest.raises(ValueError, match="padding is not on the right"):
        join_layers(heard(Call(queries=left, keys=left)), 1)
    with pytest.raises(ValueError, match=r"batch=9: a validation batch has 3"):
        join_layers(heard(Call()), 9)
