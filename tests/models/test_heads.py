"""Classifiers that were trained before: their classes are the data's by name."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close

from thresher.attention.dense import Dense
from thresher.models.heads import match_rows
from thresher.models.huggingface import huggingface_model

BERT = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (transformers.BertConfig, BERT),
    "roberta": (transformers.RobertaConfig, BERT),
    "distilbert": (
        transformers.DistilBertConfig,
        {"vocab_size": 19, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24},
    ),
    "gpt2": (transformers.GPT2Config, {"vocab_size": 19, "n_embd": 16, "n_layer": 1, "n_head": 2}),
}
TOKENS = torch.tensor([[2, 5, 6, 3], [2, 7, 8, 3], [2, 9, 10, 3]])


def saved(folder: Path, names: list[str], kind: str = "bert") -> Tensor:
    """Save a classifier of some classes, and return its logits."""
    make, size = KINDS[kind]
    torch.manual_seed(0)
    ids = dict(enumerate(names))
    config = make(**size, id2label=ids, label2id={name: i for i, name in ids.items()}, pad_token_id=0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    logits: Tensor = model(input_ids=TOKENS).logits.detach()
    return logits


def loaded(folder: Path, names: list[str] | None, count: int | None = None) -> Any:
    size = {"vocabulary": 19, "length": 40, "padding": 0, "num_classes": count or len(names or [])}
    return huggingface_model(
        attention=partial(Dense), name_or_path=str(folder), pretrained=True, class_names=names, **size
    ).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_classes_by_name(tmp_path: Path, kind: str) -> None:
    before = saved(tmp_path, ["pos", "NEUTRAL", "neg"], kind)
    net = loaded(tmp_path, ["neg", "neutral", "pos"])
    assert_close(net(TOKENS), before[:, [2, 1, 0]])
    assert net.model.config.id2label == {0: "neg", 1: "neutral", 2: "pos"}
    assert_close(loaded(tmp_path, ["neutral", "pos"])(TOKENS), before[:, [1, 0]])
    more = loaded(tmp_path, ["mixed", "neg", "neutral", "pos"])
    assert_close(more(TOKENS)[:, 1:], before[:, [2, 1, 0]])
    assert not torch.isclose(more(TOKENS)[:, :1], before).any()
    again = tmp_path / "again"
    more.model.save_pretrained(again)
    other = transformers.AutoModelForSequenceClassification.from_pretrained(again).eval()
    assert other.config.num_labels == 4


def test_a_head_in_the_right_order_is_left_alone(tmp_path: Path) -> None:
    before = saved(tmp_path, ["a", "b"])
    assert_close(loaded(tmp_path, ["a", "b"])(TOKENS), before)


def test_numbers_of_classes_are_no_order_of_letters(tmp_path: Path) -> None:
    before = saved(tmp_path, [f"LABEL_{i}" for i in range(12)])
    names = sorted(map(str, range(12)))
    assert names[2] == "10"
    assert_close(loaded(tmp_path, names)(TOKENS), before[:, [int(name) for name in names]])


def test_classes_without_names_are_taken_in_order_and_this_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = saved(tmp_path, ["LABEL_0", "LABEL_1"])
    assert_close(loaded(tmp_path, ["neg", "pos"])(TOKENS), before)
    assert "its logits are taken in the data's order, 0 = neg, 1 = pos" in caplog.text
    assert_close(loaded(tmp_path, None, 2)(TOKENS), before)


def test_ratings_are_no_numbers_of_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = saved(tmp_path, [f"LABEL_{i}" for i in range(5)])
    assert_close(loaded(tmp_path, list("12345"))(TOKENS), before)
    assert "its logits are taken in the data's order, 0 = 1, 1 = 2" in caplog.text


@pytest.mark.parametrize(
    ("own", "count"), [(["LABEL_0", "LABEL_1"], 3), (["joy", "anger"], 3), (["joy", "anger"], 2), (["LABEL_0"], 2)]
)
def test_a_head_of_other_classes_is_new_and_this_is_said(
    tmp_path: Path, own: list[str], count: int, caplog: pytest.LogCaptureFixture
) -> None:
    before = saved(tmp_path, own)
    names = ["ham", "other", "spam"][:count]
    net = loaded(tmp_path, names)
    assert net(TOKENS).shape == (3, len(names))
    assert not torch.isclose(net(TOKENS)[:, :1], before).any()
    assert f"the model tells {len(own)} classes apart (0 = {own[0]}" in caplog.text
    assert "none matches, so its head is new" in caplog.text
    encoder = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).bert
    assert_close(net.model.bert.encoder.layer[0].output.dense.weight, encoder.encoder.layer[0].output.dense.weight)


def test_a_model_without_a_head_gets_one_as_ever(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(tmp_path)
    torch.manual_seed(1)
    config = transformers.AutoConfig.from_pretrained(tmp_path, num_labels=3)
    wanted = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, config=config)
    torch.manual_seed(1)
    net = loaded(tmp_path, ["a", "b", "c"])
    assert torch.equal(net.model.classifier.weight, wanted.classifier.weight)
    assert not [r for r in caplog.records if r.name.startswith("thresher")]
    numbers = loaded(tmp_path, ["0", "1"])  # as its LABEL_0 and LABEL_1 could be called
    assert numbers(TOKENS).shape == (3, 2)


def test_a_match_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, ["pos", "neg"])
    with caplog.at_level(logging.INFO, "thresher"):
        loaded(tmp_path, ["neg", "odd", "pos"])
    assert "matched to the data's by name: neg is its neg, odd is new, pos is its pos" in caplog.text


def test_entries_of_the_configuration_that_the_data_decide_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, ["a", "b"])
    size = {"vocabulary": 19, "length": 40, "padding": 0, "num_classes": 2}
    build = partial(huggingface_model, attention=partial(Dense), name_or_path=str(tmp_path), pretrained=True, **size)
    with pytest.raises(ValueError, match=r"model\.config\.num_labels follows from the data"):
        build(config={"num_labels": 3})
    rebuilt = partial(build, pretrained=False)
    assert rebuilt(config={"num_labels": 2})(TOKENS).shape == (3, 2)  # as checkpoints of earlier versions say
    with pytest.raises(ValueError, match=r"model\.config\.num_labels follows from the data"):
        rebuilt(config={"num_labels": 3})
    with pytest.raises(ValueError, match=r"another shape than model\.config asks for: bert\.embeddings.position_emb"):
        build(config={"max_position_embeddings": 700})


@pytest.mark.parametrize(
    ("known", "wanted", "rows"),
    [
        (["a", "b"], ["b", "a"], [1, 0]),
        (["NOT_EQUIVALENT", "equivalent"], ["equivalent", "not equivalent"], [1, 0]),
        (["Pos", "pos"], ["pos", "Pos"], [1, 0]),
        (["Pos", "POS"], ["pos", "x"], None),
        (["x", "Pos"], ["pos", "POS", "x"], [None, None, 0]),
        (["LABEL_0", "LABEL_1"], ["1", "0"], [1, 0]),
        (["LABEL_0", "LABEL_1"], ["label_1", "LABEL_0"], [1, 0]),
        (["LABEL_0", "LABEL_1"], ["neg", "pos"], None),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["1", "2", "3"], None),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["2", "0"], [2, 0]),
        (["LABEL_0", "LABEL_1"], ["0", "1", "2"], None),
        (["LABEL_0", "LABEL_1"], ["1", "other"], None),
        (["LABEL_0", "pos"], ["pos", "1"], [1, None]),
        (["1", "0"], ["0", "1"], [1, 0]),
    ],
)
def test_names_match_where_there_is_no_doubt(
    known: list[str], wanted: list[str], rows: list[int | None] | None
) -> None:
    assert match_rows(dict(enumerate(known)), wanted) == rows
