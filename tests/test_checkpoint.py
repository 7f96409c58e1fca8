"""Checkpoints from strangers, from other wrappers, and of other networks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.running import CONF
from thresher import __version__, exported
from thresher.attention.thresholds import Thresholds
from thresher.checkpoint import load, load_weights
from thresher.secrets import redacted
from thresher.trust import checked_config


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "bad.ckpt"
    torch.save({"state_dict": {}, "thresher": Bomb(tmp_path / "marker")}, path)
    with pytest.raises(ValueError, match=r"bad\.ckpt cannot be read as weights"):
        load(path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("size", [0, 1000, -1])
def test_a_truncated_file_is_one_clear_error(size: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"
    torch.save({"state_dict": {"w": torch.randn(1000)}, "thresher": {"config": {}, "classes": []}}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"cut\.ckpt cannot be read"):
        load(path)


@pytest.mark.parametrize("version", ["99.0", "0.1.1.dev1"])
def test_what_a_later_version_wrote_is_refused_by_both_names(version: str, tmp_path: Path) -> None:
    record = {"version": version, "config": {}, "classes": []}
    path = tmp_path / "later.ckpt"
    torch.save({"state_dict": {}, "thresher": record}, path)
    folder = tmp_path / "later"
    folder.mkdir()
    exported.write(folder, {}, record)
    for source in (path, folder):
        with pytest.raises(
            ValueError, match=rf"{source.name} was written by thresher {version}, and this is {__version__}"
        ):
            load(source)


@pytest.mark.parametrize("version", [None, "0.0.1", "nonsense", 7])
def test_what_an_earlier_version_wrote_loads(version: Any, tmp_path: Path) -> None:
    path = tmp_path / "earlier.ckpt"
    torch.save({"state_dict": {}, "thresher": {"version": version, "config": {}, "classes": []}}, path)
    assert load(path)["state_dict"] == {}


def test_thresholds_with_one_base_hold_it_for_evaluation_too() -> None:
    net = nn.ModuleDict({"thresholds": Thresholds(2, init=1.0, tau=0.5, trainable=True)})
    state = {f"net.{name}": value + 1 for name, value in net.state_dict().items() if "eval_base" not in name}
    load_weights(nn.ModuleDict({"net": net}), state, other_attention=False)
    assert net["thresholds"].eval_base.tolist() == net["thresholds"].base.tolist() == [2.0, 2.0]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="not written by this project"):
        load(path)


@pytest.mark.parametrize("target", ["os.system", "torch.load", "builtins.open", "pathlib.Path.write_text"])
def test_a_stored_config_may_only_name_targets_of_conf(target: str) -> None:
    with pytest.raises(ValueError, match="refused"):
        checked_config({"model": {"layers": [{"_target_": target}]}}, CONF, "x.ckpt")


@pytest.mark.parametrize("wrap", [list, tuple])
def test_a_stored_config_is_not_interpolated(wrap: Any) -> None:
    with pytest.raises(ValueError, match="interpolation"):
        checked_config({"data": {"root": wrap(["${oc.env:HOME}"])}}, CONF, "x.ckpt")


def test_a_target_hides_neither_in_a_tuple_nor_in_a_string() -> None:
    with pytest.raises(ValueError, match=r"os\.getpid.*refused"):
        checked_config({"model": {"x": ({"_target_": "os.getpid"},)}}, CONF, "x.ckpt")
    with pytest.raises(ValueError, match="not a mapping"):
        checked_config("model: {_target_: os.getpid}", CONF, "x.ckpt")


def test_targets_of_conf_pass() -> None:
    checked_config({"attention": {"_target_": "thresher.attention.latte.Latte", "theta": 1.0}}, CONF, "x.ckpt")


def test_wrappers_are_understood() -> None:
    net = nn.ModuleDict({"net": nn.Linear(2, 2)})
    state = {k.replace("net.", "module._orig_mod.net._orig_mod."): v + 1 for k, v in net.state_dict().items()}
    before = net["net"].weight.clone()
    load_weights(net, state, other_attention=False)
    assert torch.equal(net["net"].weight, before + 1)


def test_what_does_not_fit_is_told() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"missing bias.*left over extra.*another shape weight"):
        load_weights(net, {"weight": torch.zeros(3, 3), "extra": torch.zeros(1)}, other_attention=False)


def test_secrets_are_redacted_and_nothing_else() -> None:
    config = {"wandb": {"api_key": "abc", "project": "x"}, "list": [{"password": "p"}], "hf_token": "t"}
    assert redacted(config) == {
        "wandb": {"api_key": "(redacted)", "project": "x"},
        "list": [{"password": "(redacted)"}],
        "hf_token": "(redacted)",
    }
    harmless = {"class_token": True, "token_dropout": 0.1, "api_key": None, "max_tokens": 5}
    assert redacted(harmless) == harmless
