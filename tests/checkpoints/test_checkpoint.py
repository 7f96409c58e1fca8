"""Checkpoints from strangers, from other wrappers, and of other networks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from tests.running import CONF
from thresher import __version__
from thresher.checkpoints.exports import write_export
from thresher.checkpoints.groups import NAMED, describe_config, restore_config
from thresher.checkpoints.load import load_checkpoint
from thresher.checkpoints.weights import load_weights
from thresher.config.overrides import compose_config
from thresher.config.redact import redact


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
        load_checkpoint(path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("size", [0, 1000, -1])
def test_a_truncated_file_is_one_clear_error(size: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"
    torch.save({"state_dict": {"w": torch.randn(1000)}, "thresher": {"config": {}, "classes": []}}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"cut\.ckpt cannot be read"):
        load_checkpoint(path)


@pytest.mark.parametrize("version", ["99.0", "0.1.1.dev1"])
def test_what_a_later_version_wrote_is_refused_by_both_names(version: str, tmp_path: Path) -> None:
    record = {"version": version, "config": {}, "classes": []}
    path = tmp_path / "later.ckpt"
    torch.save({"state_dict": {}, "thresher": record}, path)
    folder = tmp_path / "later"
    folder.mkdir()
    write_export(folder, {}, record)
    for source in (path, folder):
        with pytest.raises(
            ValueError, match=rf"{source.name} was written by thresher {version}, and this is {__version__}"
        ):
            load_checkpoint(source)


@pytest.mark.parametrize("version", [None, "0.0.1", "nonsense", 7])
def test_what_an_earlier_version_wrote_loads(version: Any, tmp_path: Path) -> None:
    path = tmp_path / "earlier.ckpt"
    torch.save({"state_dict": {}, "thresher": {"version": version, "config": {}, "classes": []}}, path)
    assert load_checkpoint(path)["state_dict"] == {}


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="not written by this project"):
        load_checkpoint(path)


@pytest.mark.parametrize("target", ["os.system", "torch.load", "builtins.open", "pathlib.Path.write_text"])
def test_a_stored_config_names_no_target(target: str) -> None:
    with pytest.raises(ValueError, match=r"a key '_target_'.*refused"):
        restore_config({"model": {"name": "vit", "arguments": {"layers": [{"_target_": target}]}}}, CONF, "x.ckpt")


@pytest.mark.parametrize("name", ["lattee", "../model/vit", "latte.yaml", "", None, ["latte"], {"x": 1}])
def test_a_stored_name_is_one_of_conf(name: Any) -> None:
    with pytest.raises(ValueError, match=r"is not a file of .*attention: refused. There are: blocks, dense, latte"):
        restore_config({"attention": {"name": name, "arguments": {}}}, CONF, "x.ckpt")


@pytest.mark.parametrize("wrap", [list, tuple])
def test_a_stored_config_is_not_interpolated(wrap: Any) -> None:
    with pytest.raises(ValueError, match=r"interpolation|not made of plain values"):
        restore_config({"data": {"name": "cifar10", "arguments": {"root": wrap(["${oc.env:HOME}"])}}}, CONF, "x.ckpt")


def test_a_target_hides_neither_in_a_tuple_nor_in_a_string() -> None:
    with pytest.raises(ValueError, match=r"not made of plain values.*refused"):
        restore_config({"model": {"x": ({"_target_": "os.getpid"},)}}, CONF, "x.ckpt")
    with pytest.raises(ValueError, match="not a mapping"):
        restore_config("model: {_target_: os.getpid}", CONF, "x.ckpt")


@pytest.mark.parametrize(
    "overrides",
    [
        *([f"{p.parent.name}={p.stem}"] for group in NAMED for p in sorted((CONF / group).glob("*.yaml"))),
        ["model=transformer", "attention@model.cross=topk", "model.cross.keys=8", "attention@model.decoder=latte"],
        ["~callbacks.calibrate", "callbacks.watch=null"],
        ["trainer=fsdp", "trainer.strategy=ddp"],
        ["+attention.more=3", "~attention.unit", "data.image_size=[28,30]", "+model.config={a: {b: 1}}"],
    ],
    ids=" ".join,
)
def test_a_config_is_stored_by_names_and_restored_as_it_was(overrides: list[str]) -> None:
    required = {
        "data=image_folder": "data.root=x",
        "data=text_corpus": "data.root=x",
        "data=text_files": "data.train=x",
    }
    required |= dict.fromkeys(("model=hf", "model=sentence_encoder"), "model.name_or_path=x")
    given = [*overrides, *(required[o] for o in overrides if o in required)]
    config = plain(compose_config(CONF, "train", ["run.name=x", "run.dir=y", *given]))
    stored, unnamed = describe_config(config, CONF)
    assert not unnamed
    assert "_target_" not in str(stored)
    for override in overrides:
        group, _, name = override.partition("=")
        if group in NAMED and override != "trainer=fsdp":
            assert stored[group]["name"] == name
    del config["logger"]
    assert plain(OmegaConf.create(restore_config(stored, CONF, "x.ckpt"))) == config


def test_what_no_file_names_is_left_out_and_said() -> None:
    config = plain(compose_config(CONF, "train", ["run.name=x", "run.dir=y", "task._target_=mine.Task"]))
    stored, unnamed = describe_config(config, CONF)
    assert unnamed == ["task"]
    assert "task" not in stored


def plain(config: DictConfig) -> dict[str, Any]:
    container: Any = OmegaConf.to_container(config, resolve=True)
    return container


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
    assert redact(config) == {
        "wandb": {"api_key": "(redacted)", "project": "x"},
        "list": [{"password": "(redacted)"}],
        "hf_token": "(redacted)",
    }
    harmless = {"class_token": True, "token_dropout": 0.1, "api_key": None, "max_tokens": 5}
    assert redact(harmless) == harmless
