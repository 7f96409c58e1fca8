"""Auxiliary losses in trainings, tunings and the Trainer of transformers: added by their weight, logged, refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.budget.test_tuning import build, tune_quickly
from tests.integrations.test_transformers import SparseCallback, build_trainer
from tests.integrations.test_transformers import build as build_llama
from tests.running import tiny_config
from tests.tasks.test_distillation import read_rows, read_state
from thresher.attention.shared.selectors import named_selectors
from thresher.run import train as training

SHORT = ("trainer.max_epochs=1", "test=false", "callbacks.watch.moved=0")
BLOCKS = (
    *("attention=blocks", "attention.block.keys=2", "attention.block.rank=learned", "attention.estimate.bits=exact"),
    *("compute=target", "compute.target=0.5"),
)
OPTIONS: dict[str, Any] = {
    "attention": "blocks",
    "block": {"queries": 8, "keys": 4, "rank": "learned"},
    "estimate": {"bits": "exact"},
}


def read_gates(model: nn.Module) -> list[Tensor]:
    gates = [p.detach().clone() for _, selector in named_selectors(model) for p in selector.parameters()]
    assert gates
    return gates


def has_moved(gates: list[Tensor]) -> bool:
    """Tell whether projections differ from those that change nothing."""
    return any(not torch.equal(gate, torch.eye(gate.shape[-1]).expand_as(gate)) for gate in gates)


def test_a_training_adds_the_loss_by_its_weight_and_logs_it(tmp_path: Path) -> None:
    for name, overrides in (("stated", ()), ("given", ("+task.auxiliary.gate=0",))):
        training.train(tiny_config(tmp_path / name, *SHORT, *BLOCKS, *overrides))
    logged = {name: read_rows(tmp_path / name, "train/auxiliary/gate") for name in ("stated", "given")}
    assert logged["stated"]
    assert all(value > 0 for value in (*logged["stated"], *logged["given"]))
    gates = {
        name: [x for key, x in read_state(tmp_path / name).items() if ".tile_gate." in key]
        for name in ("stated", "given")
    }
    assert has_moved(gates["stated"])
    assert gates["given"]
    assert not has_moved(gates["given"]), "neither a loss nor weight decay"


def test_a_training_refuses_a_loss_that_its_network_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.auxiliary\.gat: there is no such .* did you mean .*\.gate"):
        training.train(tiny_config(tmp_path, *SHORT, *BLOCKS, "+task.auxiliary.gat=1"))
    with pytest.raises(ValueError, match=r"task\.auxiliary\.gate: .* none: no mechanism of the network has one"):
        training.train(tiny_config(tmp_path, *SHORT, "+task.auxiliary.gate=1"))


def test_a_tuning_trains_selectors_by_their_loss_and_no_weight() -> None:
    model = build(**OPTIONS)
    before = {name: x.clone() for name, x in model.state_dict().items() if "mechanism" not in name}
    found = tune_quickly(model, steps=20, starts=("share",))
    assert has_moved(read_gates(model))
    assert found.tuned.error <= found.calibrated.error
    assert all(torch.equal(model.state_dict()[name], x) for name, x in before.items())
    still = build(**OPTIONS)
    tune_quickly(still, steps=20, starts=("share",), auxiliary={"gate": 0})
    assert not has_moved(read_gates(still))
    with pytest.raises(ValueError, match=r"auxiliary\.gates: there is no such auxiliary loss; did you mean"):
        tune_quickly(model, auxiliary={"gates": 1.0})


def test_a_tuning_with_selectors_continues_from_its_file(tmp_path: Path) -> None:
    whole, broken = build(**OPTIONS), build(**OPTIONS)
    tune_quickly(whole, steps=20, starts=("share",))

    def stop(step: int, measured: Any) -> None:
        if step == 15:
            raise KeyboardInterrupt

    for on_step in (stop, None):
        try:
            tune_quickly(broken, steps=20, starts=("share",), state_file=tmp_path / "state.pt", on_step=on_step)
        except KeyboardInterrupt:
            assert not has_moved(read_gates(broken)), "an interrupt restores selectors"
    assert has_moved(read_gates(whole))
    for one, other in zip(read_gates(whole), read_gates(broken), strict=True):
        assert torch.equal(one, other)


def test_the_trainer_of_transformers_adds_the_loss(tmp_path: Path) -> None:
    for weight, moves in ((1.0, True), (0.0, False)):
        model = build_llama(**OPTIONS)
        trainer = build_trainer(model, tmp_path / str(weight), SparseCallback(0.5, auxiliary={"gate": weight}))
        trainer.train()
        assert has_moved(read_gates(model)) == moves
        assert any(row.get("auxiliary/gate", 0) > 0 for row in trainer.state.log_history)
