"""The self-test sees what it is there to see, in every kind of model that can be named."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.running import CONF, tiny_config
from thresher.config.overrides import compose_config
from thresher.run import train as training
from thresher.tools.doctor.masks import AS_IT_IS, check_masks
from thresher.tools.doctor.subjects import load_subject

SETTINGS = {"latte": {"threshold": 0.5}, "topk": {"keys": 4}, "smyrf": {"cluster": 4}}
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}


def rows_of(name: str, *mechanisms: str, where: str | None = None) -> dict[str, dict[str, Any]]:
    subject = load_subject(name, 32, CONF)
    return {row["mechanism"]: row for row in check_masks(subject, mechanisms, SETTINGS, where, False)}


@pytest.mark.parametrize(
    ("name", "leak"),
    [
        ("shows_padding", "padding"),
        ("shows_the_future", "future"),
        ("shows_neighbours", "neighbours"),
        ("forgets_its_mask", "padding"),
    ],
)
def test_each_leak_is_seen(name: str, leak: str) -> None:
    row = rows_of(f"tests.tools.doctor.models:{name}")[AS_IT_IS]
    assert row["failed"] == [leak]
    assert row["moved"][leak] > 1e-3


def test_a_sound_model_moves_by_nothing_with_any_mechanism_and_is_given_back() -> None:
    subject = load_subject("tests.tools.doctor.models:encoder", 32, CONF)
    keys = list(subject.model.state_dict())
    names = ("latte", "topk", "smyrf", "yoso", "mca")
    rows = list(check_masks(subject, names, SETTINGS, None, False))
    assert [row["mechanism"] for row in rows] == [AS_IT_IS, *names]
    for row in rows:
        assert row["moved"] == {"padding": 0.0, "neighbours": 0.0}, row["mechanism"]
        assert not row["failed"]
    assert rows[1]["hosts"] == ["2 noncausal self in MultiheadAttention"]
    assert 0 < rows[1]["kept"] < 0.9
    assert list(subject.model.state_dict()) == keys


def test_a_mounted_decoder_is_tested_for_the_future() -> None:
    row = rows_of("tests.tools.doctor.models:decoder")[AS_IT_IS]
    assert row["moved"] == {"future": 0.0, "neighbours": 0.0}
    assert row["hosts"] == ["2 causal self in Attention"]


def test_a_model_of_timms_hides_patches() -> None:
    rows = rows_of("timm:test_vit", "latte", "smyrf")
    for name in ("latte", "smyrf"):
        assert rows[name]["moved"] == {"padding": 0.0, "neighbours": 0.0}
        assert 0 < rows[name]["kept"] < 0.9


CONFIGS = {
    "bert": ("BertConfig", SIZE, {"padding", "neighbours"}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2}, {"padding", "future", "neighbours"}),
    "t5": (
        "T5Config",
        {"d_model": 32, "d_kv": 16, "d_ff": 40, "num_layers": 2, "num_heads": 2},
        {"padding", "future", "neighbours"},
    ),
    "vit": ("ViTConfig", SIZE | {"image_size": 16, "patch_size": 4}, {"neighbours"}),
}


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_model_of_transformers_is_tested_for_what_it_hides(kind: str, tmp_path: Path) -> None:
    name, size, hidden = CONFIGS[kind]
    words = {} if kind == "vit" else {"vocab_size": 40, "pad_token_id": 0}
    getattr(transformers, name)(**size, **words).save_pretrained(tmp_path)
    rows = rows_of(str(tmp_path), "latte", "topk")
    for name in ("latte", "topk"):
        assert set(rows[name]["moved"]) == hidden
        assert not rows[name]["failed"]
        assert 0 < rows[name]["kept"] < 0.95
    assert "future" not in rows[AS_IT_IS]["moved"]


def test_a_refusal_is_a_failure_only_where_it_was_asked_for() -> None:
    subject = load_subject("tests.tools.doctor.models:encoder", 32, CONF)
    for asked, failed in ((False, []), (True, ["refused"])):
        rows = list(check_masks(subject, ["latte"], SETTINGS, "no such module", asked))
        assert "no attention module matches" in rows[1]["refused"]
        assert rows[1]["failed"] == failed


SHORT = ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "trainer.max_epochs=1", "test=false")
TEXT = ("data=shakespeare", "data.context=32", "data.batch_size=4", "task=language_modeling", "model=transformer")
TINY = ("model.dim=16", "model.depth=1", "model.num_heads=2", "model.ffn_dim=24", "run.name=test", "~callbacks.watch")


@pytest.mark.parametrize(
    ("objective", "hidden"),
    [("causal", {"padding", "future", "neighbours"}), ("denoising", {"padding", "future", "neighbours"})],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_trained_language_model_is_tested_as_it_is(objective: str, hidden: set[str], tmp_path: Path) -> None:
    given = (*TEXT, *TINY, *SHORT, f"data.objective={objective}", f"run.dir='{tmp_path}'")
    training.train(compose_config(CONF, "train", given))
    row = rows_of(str(tmp_path))[AS_IT_IS]
    assert set(row["moved"]) == hidden
    assert not row["failed"]
    assert any("causal self in Attention" in place for place in row["hosts"])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_trained_image_classifier_is_tested_as_it_is(tmp_path: Path) -> None:
    training.train(tiny_config(tmp_path, *SHORT, "~callbacks.watch"))
    row = rows_of(str(tmp_path / "checkpoints" / "last.ckpt"))[AS_IT_IS]
    assert row["moved"] == {"padding": 0.0, "neighbours": 0.0}
    assert row["hosts"] == ["2 noncausal self in TimmAttention"]
