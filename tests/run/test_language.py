"""Trainings on text by the real command, tiny: classification, language modelling of each objective, evaluation."""

import json
import math
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from hydra.errors import InstantiationException
from torch.nn import functional as F

from tests.data.glue import save_glue
from tests.data.tokenizer import WORDS, save_tokenizer
from tests.running import CONF, run_eval
from thresher.attention.dense import Dense
from thresher.budget.budgets import Budget
from thresher.checkpoints.rebuild import load_model
from thresher.config.overrides import compose_config
from thresher.models.huggingface import huggingface_model
from thresher.models.transformer import Classifier
from thresher.run import train as training
from thresher.tasks.language_modeling import IGNORED, BitsPerByte, TokenAccuracy
from thresher.tasks.optimizer import adamw, constant
from thresher.tasks.text_classification import TextClassification

TRAINER = (
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=6",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "trainer.log_every_n_steps=1",
    "run.name=test",
)
SMALL = ("model.dim=16", "model.depth=1", "model.num_heads=2", "model.ffn_dim=24")
TEXT = ("data=austen", "data.length=40", "data.batch_size=8", "task=text_classification", "model=encoder", *SMALL)
CORPUS = ("data=shakespeare", "data.context=32", "data.batch_size=8", "task=language_modeling")
OURS = (*CORPUS, "model=transformer", *SMALL)


def train(folder: Path, *overrides: str) -> dict[str, float]:
    return training.train(compose_config(CONF, "train", [*TRAINER, f"run.dir='{folder}'", *overrides]))


def test_text_classification_reports_macro_f1_and_evaluates_to_the_same_numbers(tmp_path: Path) -> None:
    metrics = train(tmp_path / "run", *TEXT, "task.class_weights=balanced")
    assert 0 <= metrics["test/f1"] <= 1
    again = run_eval([f"ckpt={tmp_path}/run/checkpoints/best.ckpt", f"run.dir={tmp_path}/eval"], CONF)
    for name in ("test/acc", "test/f1", "test/loss", "test/kept", "test/compute"):
        assert again[name] == metrics[name]


@pytest.mark.parametrize("objective", ["causal", "masked", "denoising"])
def test_language_modelling_of_each_objective(tmp_path: Path, objective: str) -> None:
    metrics = train(tmp_path / "run", *OURS, f"data.objective={objective}")
    assert metrics["test/perplexity"] == pytest.approx(math.exp(metrics["test/loss"]), rel=1e-4)
    assert ("test/bits_per_byte" in metrics) == (objective == "causal")
    if objective == "causal":
        assert metrics["test/bits_per_byte"] == pytest.approx(metrics["test/loss"] / math.log(2), rel=1e-4)
    layers = json.loads((tmp_path / "run" / "heads.json").read_text())["layers"]
    assert len(layers) == {"causal": 1, "masked": 1, "denoising": 3}[objective]
    again = run_eval([f"ckpt={tmp_path}/run/checkpoints/best.ckpt", f"run.dir={tmp_path}/eval"], CONF)
    assert again["test/loss"] == metrics["test/loss"]


def test_each_place_of_an_encoder_decoder_can_have_a_mechanism_of_its_own(tmp_path: Path) -> None:
    places = ("attention@model.cross=dense", "attention@model.encoder=smyrf", "attention=topk", "compute=free")
    train(tmp_path, *OURS, "data.objective=denoising", *places)
    layers = json.loads((tmp_path / "heads.json").read_text())["layers"]
    kept = {layer["name"]: layer["heads"][0]["kept"] for layer in layers}
    assert kept["decoder.blocks.0.cross"] == 1
    assert kept["decoder.blocks.0.attn"] < 0.2
    assert list(kept) == ["encoder.blocks.0.attn", "decoder.blocks.0.attn", "decoder.blocks.0.cross"]


def test_a_mechanism_for_a_place_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InstantiationException, match=r"model\.cross would have no effect: data\.objective=causal builds decoder"
    ):
        train(tmp_path, *OURS, "attention@model.cross=dense")


def test_an_evaluation_replaces_the_mechanisms_of_all_places(tmp_path: Path) -> None:
    places = (
        "attention@model.cross=latte",
        "model.cross.gate.tau=0.7",
        "model.cross.gate.surrogate=sigmoid",
        "attention=topk",
        "compute=free",
    )
    train(tmp_path / "run", *OURS, "data.objective=denoising", *places)
    asked = [f"ckpt={tmp_path}/run/checkpoints/best.ckpt", f"run.dir={tmp_path}/eval"]
    for override, message in (
        ("attention@model.cross=dense", r"eval\.py replaces attention as a whole"),
        ("model.cross.threshold=3", r"model\.cross\.threshold is a starting value"),
    ):
        with pytest.raises(ValueError, match=message):
            run_eval([*asked, override], CONF)
    assert run_eval([*asked, "attention=dense"], CONF)["test/kept"] == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("data=shakespeare", "model=encoder", "task=language_modeling"),
            "model: .*token_classifier is not for Shakes",
        ),
        (("data=austen", "model=encoder", "task=classification"), "task: .*Classification is not for Austen"),
        (("data=austen", "model=vit", "task=text_classification"), "model: .*timm_classifier is not for Austen"),
        (("data=fashion_mnist_12k", "model=transformer"), "model: .*language_model is not for FashionMNIST12k"),
    ],
)
def test_models_and_tasks_for_other_data_are_refused(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path, *overrides)


def test_balanced_weights_make_rare_classes_count_as_much_as_frequent_ones() -> None:
    net = Classifier(Dense, num_classes=2, vocabulary=9, length=8, dim=8, depth=1, num_heads=1, ffn_dim=8)
    parts = {"optimizer": adamw, "scheduler": constant, "budget": Budget(), "seed": 0}
    task = TextClassification(net, **parts, num_classes=2, class_counts=[30, 10], class_weights="balanced")
    assert task.weights is not None
    assert task.weights.tolist() == pytest.approx([40 / 60, 40 / 20])


def test_metrics_of_tokens_leave_out_what_is_not_due() -> None:
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[1, 2, IGNORED], [4, IGNORED, IGNORED]])
    due = targets != IGNORED
    bits, accuracy = BitsPerByte(4.0), TokenAccuracy(5)
    for i in range(2):
        bits.update(logits[i : i + 1], targets[i : i + 1])
        accuracy.update(logits[i : i + 1], targets[i : i + 1])
    nats = F.cross_entropy(logits[due], targets[due])
    assert bits.compute().item() == pytest.approx(nats.item() / math.log(2) / 4, rel=1e-5)
    assert accuracy.compute() == (logits.argmax(-1) == targets)[due].float().mean()


BERT = "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 24}"
GPT = "{n_embd: 16, n_layer: 1, n_head: 2, n_positions: 64}"


@pytest.mark.parametrize("tokenizer", ["bytes", "words", "words that fill up with their end"])
def test_a_bert_with_random_weights_classifies_texts(tmp_path: Path, tokenizer: str) -> None:
    pad = "[PAD]" if tokenizer == "words" else "[SEP]"
    name = tokenizer if tokenizer == "bytes" else str(save_tokenizer(tmp_path / "tokenizer", pad=pad))
    data = (
        "data=austen",
        "data.length=40",
        "data.batch_size=8",
        f"data.tokenizer='{name}'",
        "task=text_classification",
    )
    metrics = train(tmp_path / "run", *data, "model=bert_small", f"model.config={BERT}")
    again = run_eval([f"ckpt={tmp_path}/run/checkpoints/best.ckpt", f"run.dir={tmp_path}/eval"], CONF)
    assert again["test/loss"] == metrics["test/loss"]
    assert metrics["test/kept"] < 1


@pytest.mark.parametrize("model", ["bert_small", "encoder", "sentence_encoder"])
def test_pairs_of_sentences_are_classified(tmp_path: Path, model: str) -> None:
    save_glue(tmp_path / "copy", {"sentence1": "the cat sat on a mat", "sentence2": "the dog ran {}"})
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    settings = {
        "encoder": SMALL,
        "bert_small": (f"model.config={BERT}",),
        "sentence_encoder": (f"+model.config={BERT}", "model.name_or_path=bert", "model.pretrained=false"),
    }
    data = ("data=glue", "data.task=mrpc", f"data.root='{tmp_path}/copy'", f"data.tokenizer='{tokenizer}'")
    text = (*data, "data.batch_size=8", "data.length=12", "task=text_classification", f"model={model}")
    metrics = train(tmp_path / "run", *text, *settings[model])
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    assert run_eval([f"ckpt={best}", f"run.dir={tmp_path}/eval"], CONF)["test/loss"] == metrics["test/loss"]
    told = [module.separator for module in load_model(best).modules() if hasattr(module, "separator")]
    assert told == [transformers.AutoTokenizer.from_pretrained(str(tokenizer)).sep_token_id]


def test_a_bert_is_told_which_tokens_are_of_the_second_text(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(save_tokenizer(tmp_path)))
    inputs = tokenizer(
        ["the cat", "a man"], ["sat on a mat", "ate"], padding=True, return_tensors="pt", return_token_type_ids=True
    )
    size = {"vocabulary": 19, "length": 40, "padding": 0, "num_classes": 2, "separator": 3}
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    net = huggingface_model(attention=partial(Dense), name_or_path="bert", config=config, **size).eval()
    assert torch.equal(net(inputs["input_ids"]), net.model(**inputs).logits)
    assert inputs["token_type_ids"].unique().tolist() == [0, 1]
    without = net.model(**{name: x for name, x in inputs.items() if name != "token_type_ids"}).logits
    assert not torch.allclose(net(inputs["input_ids"]), without)
    single = huggingface_model(
        attention=partial(Dense), name_or_path="roberta", config=config | {"type_vocab_size": 1}, **size
    )
    assert single.separator is None  # it has one type of tokens
    assert single(inputs["input_ids"]).shape == (2, 2)


def test_a_gpt_with_random_weights_models_language(tmp_path: Path) -> None:
    metrics = train(tmp_path / "run", *CORPUS, "model=gpt_small", f"model.config={GPT}")
    assert 0 < metrics["test/bits_per_byte"] < 20
    assert metrics["test/kept"] < 1


T5 = "{d_model: 16, d_kv: 8, d_ff: 24, num_layers: 1, num_heads: 2}"
SIDES = ("encoder", "decoder")
BART = ", ".join(f"{side}_layers: 1, {side}_attention_heads: 2, {side}_ffn_dim: 24" for side in SIDES)


@pytest.mark.parametrize(
    ("kind", "config", "names"),
    [
        ("t5", T5, ["encoder", "SelfAttention", "EncDecAttention"]),
        ("bart", f"{{d_model: 16, {BART}}}", ["encoder", "self_attn", "encoder_attn"]),
    ],
)
def test_an_encoder_decoder_of_transformers_restores_text(
    tmp_path: Path, kind: str, config: str, names: list[str]
) -> None:
    model = ("model=hf", f"model.name_or_path={kind}", "model.pretrained=false", f"+model.config={config}")
    restoring = (*CORPUS, "data.objective=denoising", *model)
    metrics = train(tmp_path / "all", *restoring)
    assert metrics["test/perplexity"] == pytest.approx(math.exp(metrics["test/loss"]), rel=1e-4)
    layers = [layer["name"] for layer in json.loads((tmp_path / "all" / "heads.json").read_text())["layers"]]
    assert all(name in layer for name, layer in zip(names, layers, strict=True))
    train(tmp_path / "cross", *restoring, f"model.where={names[2]}")
    sparse = [layer["name"] for layer in json.loads((tmp_path / "cross" / "heads.json").read_text())["layers"]]
    assert sparse == layers[2:]


def test_what_follows_from_an_entry_of_a_configuration_follows() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    size = {"vocabulary": 19, "length": 40, "padding": 0, "objective": "causal"}
    net = huggingface_model(attention=partial(Dense), name_or_path="llama", config=small, **size)
    assert [m.head_dim for m in net.modules() if isinstance(m, Dense)] == [8]  # not a Llama's 128
    assert net(torch.tensor([[1, 2, 3]])).shape == (1, 3, 19)


def test_weights_of_a_folder_are_loaded_and_their_tokenizer_must_fit(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    config = transformers.BertConfig(
        vocab_size=19, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    saved = transformers.BertForSequenceClassification(config)
    saved.save_pretrained(tmp_path)
    size = {"vocabulary": 19, "length": 40, "padding": 0, "num_classes": 2}
    net = huggingface_model(attention=partial(Dense), name_or_path=str(tmp_path), pretrained=True, **size)
    tokens = torch.tensor([[2, 5, 6, 3, 0, 0], [2, 7, 8, 9, 10, 3]])
    wanted = saved.eval()(input_ids=tokens, attention_mask=tokens != 0).logits
    torch.testing.assert_close(net.eval()(tokens), wanted)
    with pytest.raises(ValueError, match=r"knows 19 tokens, the tokenizer has 260: set data.tokenizer"):
        huggingface_model(
            attention=partial(Dense), name_or_path=str(tmp_path), pretrained=True, **(size | {"vocabulary": 260})
        )
    with pytest.raises(ValueError, match=r"positions for 512 tokens, the data have up to 600.*data\.length"):
        huggingface_model(
            attention=partial(Dense), name_or_path=str(tmp_path), pretrained=True, **(size | {"length": 600})
        )
    with pytest.raises(ValueError, match="BertConfig has no entry hiden_size"):
        huggingface_model(attention=partial(Dense), name_or_path="bert", config={"hiden_size": 3}, **size)
    with pytest.raises(FileNotFoundError, match=r"there is no model 'brt': model.name_or_path names a folder"):
        huggingface_model(attention=partial(Dense), name_or_path="brt", **size)


@pytest.mark.parametrize("data", ["text_files", "glue"])
def test_a_trained_classifier_begins_with_its_own_classes(tmp_path: Path, data: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(save_tokenizer(tmp_path / "model")))
    names = ["Yes", "no"] if data == "glue" else ["b", "C", "a"]
    torch.manual_seed(0)
    size = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = dict(enumerate(names))
    config = transformers.BertConfig(
        **size, intermediate_size=24, id2label=ids, label2id={name: i for i, name in ids.items()}
    )
    saved = transformers.BertForSequenceClassification(config).eval()
    for parameter in saved.parameters():
        torch.nn.init.normal_(parameter)
    texts = [f"the {word} {other}" for word in WORDS for other in WORDS]
    inputs = tokenizer(texts, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        saved.classifier.bias -= saved(input_ids=inputs).logits.mean(0)
        labels = saved(input_ids=inputs).logits.argmax(-1).tolist()
    saved.save_pretrained(tmp_path / "model")
    assert set(labels) == set(ids)
    if data == "glue":
        rows = {"sentence": texts, "label": [1 - label for label in labels]}  # no is 0 there
        features = {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
        split = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        datasets.DatasetDict({"train": split, "validation": split}).save_to_disk(str(tmp_path / "copy"))
        given = ("data=glue", f"data.root='{tmp_path}/copy'")
    else:
        lines = [f"{text},{names[label].lower()}" for text, label in zip(texts, labels, strict=True)]
        (tmp_path / "a.csv").write_text("\n".join(["text,label", *lines]))
        given = ("data=text_files", f"data.train='{tmp_path}/a.csv'")
    model = ("model=hf", f"model.name_or_path='{tmp_path}/model'", f"data.tokenizer='{tmp_path}/model'")
    still = ("optimizer.lr=0", "attention=dense", "compute=free", "task=text_classification")
    assert train(tmp_path / "run", *given, *model, *still)["test/acc"] == 1.0
