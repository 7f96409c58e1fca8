"""Padding is what fills up a batch, whatever ids the texts hold: as with a token that no text has."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from tests.data.glue import save_glue
from tests.data.tokenizer import save_tokenizer
from thresher import densify
from thresher.attention.dense import Dense
from thresher.budget.meter import ComputeMeter
from thresher.data.corpus import mask_tokens
from thresher.data.glue import Glue
from thresher.data.text_corpus import TextCorpus
from thresher.data.text_files import TextFiles
from thresher.data.tokens import FILLS, load_tokenizer
from thresher.models.build import language_model, token_classifier
from thresher.models.huggingface import huggingface_model, sentence_encoder

SIZE = {"vocabulary": 19, "length": 24}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
SIDES = {
    f"{s}_{k}": n for s in ("encoder", "decoder") for k, n in {"layers": 1, "attention_heads": 2, "ffn_dim": 24}.items()
}
BART = {"d_model": 16, "eos_token_id": 3, "bos_token_id": 2, "decoder_start_token_id": 3, **SIDES}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
OURS = {"dim": 16, "depth": 1, "num_heads": 2, "ffn_dim": 24}

# By name: how a network is built, and of what. Token 3 ends texts.
NETS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "classifier": (token_classifier, {"num_classes": 2, **OURS}),
    "pairs": (token_classifier, {"num_classes": 2, "separator": 3, **OURS}),
    "causal": (language_model, {"objective": "causal", **OURS}),
    "masked": (language_model, {"objective": "masked", **OURS}),
    "denoising": (language_model, {"objective": "denoising", **OURS}),
    "bert": (huggingface_model, {"num_classes": 2, "separator": 3, "name_or_path": "bert", "config": BERT}),
    "roberta": (huggingface_model, {"num_classes": 2, "name_or_path": "roberta", "config": BERT}),
    "gpt2": (huggingface_model, {"num_classes": 2, "name_or_path": "gpt2", "config": GPT}),
    "llama": (huggingface_model, {"num_classes": 2, "name_or_path": "llama", "config": BERT}),
    "bert masked": (huggingface_model, {"objective": "masked", "name_or_path": "bert", "config": BERT}),
    "gpt2 causal": (huggingface_model, {"objective": "causal", "name_or_path": "gpt2", "config": GPT}),
    "t5 denoising": (huggingface_model, {"objective": "denoising", "name_or_path": "t5", "config": T5}),
    "bart denoising": (huggingface_model, {"objective": "denoising", "name_or_path": "bart", "config": BART}),
    "sentences": (sentence_encoder, {"name_or_path": "bert", "pretrained": False, "config": BERT, "separator": 3}),
}


def texts(padding: int) -> Tensor:
    """Return three texts with tokens that end something inside and at the end, two of them filled up."""
    tokens = torch.randint(5, 19, (3, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, 3] = tokens[:, 5] = tokens[0, 11] = tokens[1, 7] = tokens[2, 8] = 3
    tokens[1, 8:] = tokens[2, 9:] = padding
    return tokens


@pytest.mark.parametrize("name", NETS)
def test_a_token_that_fills_up_and_ends_texts_hides_what_a_separate_one_does(name: str) -> None:
    build, settings = NETS[name]
    found, weights = {}, None
    two = settings.get("objective") == "denoising"
    for padding in (0, FILLS):
        torch.manual_seed(0)
        net = build(attention=partial(Dense), padding=padding, **SIZE, **settings).eval()
        weights = weights or net.state_dict()
        net.load_state_dict(weights)
        tokens = texts(padding)
        meter = ComputeMeter(net)
        with meter:
            out = net(tokens, tokens.roll(1, 0)) if two else net(tokens)
        pairs = [float(cost.visible.sum()) for cost in meter.costs()]
        hidden = (tokens.roll(1, 0) if two else tokens) == padding
        found[padding] = out.masked_fill(hidden[..., None], 0) if out.dim() == 3 else out, pairs
    assert_close(found[FILLS][0], found[0][0])
    assert found[FILLS][1] == found[0][1]


DATA: dict[str, tuple[str, dict[str, Any]]] = {
    "texts": ("classifier", {}),
    "texts in a BERT": ("bert", {}),
    "pairs": ("pairs", {}),
    "pairs in a BERT": ("bert", {}),
    **{objective: (objective, {"objective": objective}) for objective in ("causal", "masked", "denoising")},
    "causal in a GPT-2": ("gpt2 causal", {"objective": "causal"}),
}


class Growing(str):
    """A text that is repeated more or less often."""

    def format(self, *numbers: Any, **_: Any) -> str:
        return self * (1 + numbers[0] % 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of texts that name the token that ends them, and of tokenizers by what fills up."""
    root = tmp_path_factory.mktemp("padding")
    save_tokenizer(root / "separate")
    save_tokenizer(root / "same", pad="[SEP]")
    save_tokenizer(root / "none", pad=None)
    lines = [f"{'the cat [SEP] sat ' * (1 + i % 4)},{'ab'[i % 2]}" for i in range(30)]
    (root / "texts.csv").write_text("\n".join(["text,label", *lines]))
    (root / "corpus.txt").write_text("the cat sat [SEP] a man ate it all [SEP] the dog ran " * 40)
    save_glue(root / "copy", {"sentence1": "the cat [SEP] sat", "sentence2": Growing("a man ")})
    return root


def data_of(folder: Path, tokenizer: str, name: str, **settings: Any) -> Any:
    common = {"tokenizer": str(folder / tokenizer), "batch_size": 4}
    if name.startswith("texts"):
        data: Any = TextFiles(train=str(folder / "texts.csv"), length=24, **common)
    elif name.startswith("pairs"):
        data = Glue(task="mrpc", root=str(folder / "copy"), length=24, **common)
    else:
        data = TextCorpus(root=str(folder / "corpus.txt"), context=22, **common, **settings)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("name", DATA)
def test_losses_and_visible_pairs_are_those_of_a_tokenizer_with_its_own_padding(name: str, folder: Path) -> None:
    kind, objective = DATA[name]
    build, settings = NETS[kind]
    found, weights = {}, None
    for tokenizer in ("separate", "same", "none"):
        data = data_of(folder, tokenizer, name, **objective)
        torch.manual_seed(0)
        net = build(attention=partial(Dense), **(settings | dict(data.model_arguments))).eval()
        weights = weights or net.state_dict()
        net.load_state_dict(weights)
        meter = ComputeMeter(net)
        losses, pairs, padded = [], [], 0
        for inputs, targets in data.test_dataloader():
            inputs = inputs if isinstance(inputs, tuple) else (inputs,)
            padded += int((inputs[0] == data.model_arguments["padding"]).sum())
            with meter, torch.no_grad():
                out = net(*inputs)
            losses.append(F.cross_entropy(out.flatten(0, -2), targets.flatten()))
            pairs.append([float(cost.visible.sum()) for cost in meter.costs()])
        assert padded > 0
        found[tokenizer] = torch.stack(losses), pairs
    for tokenizer in ("same", "none"):
        if name != "masked":  # there random tokens stand for some, and one of them has one more to choose from
            assert_close(found[tokenizer][0], found["separate"][0])
        assert found[tokenizer][1] == found["separate"][1]


@pytest.mark.parametrize("pad", ["[SEP]", "[CLS]", "[UNK]", "[MASK]", None])
def test_a_token_of_texts_is_no_padding(tmp_path: Path, pad: str | None) -> None:
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path, pad=pad)))
    assert tokenizer.padding == FILLS
    (ids,) = tokenizer.encode(["the cat"], whole=True)
    assert tokenizer.pieces([*ids, FILLS]) == ["[CLS]", "the", "cat", "[SEP]", "[padding]"]
    assert tokenizer.decode([*ids, FILLS]) == "the cat"
    assert tokenizer.vocabulary == 19


def test_a_text_that_names_the_padding_token_is_read_as_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path)))
    ids = tokenizer.encode(["the [PAD] cat", "the [SEP] cat"], whole=True)
    assert tokenizer.padding == 0
    assert 0 not in ids[0]
    assert ids[0][:2] + ids[0][-2:] == [2, 5, 6, 3]
    assert tokenizer.pieces(ids[1]) == ["[CLS]", "the", "[SEP]", "cat", "[SEP]"]
    assert 0 not in tokenizer.encode_pairs(["the [PAD]"], ["cat [PAD]"], limit=20).ids[0]


@pytest.mark.parametrize("kind", ["pieces", "words", "words without an unknown one"])
def test_a_padding_token_that_is_a_piece_like_others_stands_in_no_text(tmp_path: Path, kind: str) -> None:
    if kind == "pieces":
        scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -5.0) for c in "abcdp<>")]
        inner = Tokenizer(models.Unigram(scores, unk_id=2))
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "b"])}))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    unknown = {} if "without" in kind else {"unk_token": "<unk>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", **unknown)
    made.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.padding == (0 if unknown else FILLS)
    texts = ["a <pad> b", "<pad>", "a b"]
    found = tokenizer.encode(texts, whole=True) + tokenizer.encode_pairs(texts, texts, limit=50).ids
    assert not [ids for ids in found if tokenizer.padding in ids]
    if unknown:
        assert [ids.count(2) for ids in found] == [1, 1, 0, 2, 2, 0]
    else:
        assert tokenizer.pieces(found[0]) == ["a", "<pad>", "b", "</s>"]


@pytest.mark.parametrize("pad", ["[PAD]", "[SEP]"])
def test_masking_puts_no_padding_in_the_place_of_tokens(tmp_path: Path, pad: str) -> None:
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path, pad=pad)))
    tokenizer.padding = 7 if tokenizer.padding >= 0 else FILLS
    tokens = torch.full((20_000,), 8)
    (inputs,), _ = mask_tokens(tokens, tokenizer, torch.Generator().manual_seed(0))
    wanted = set(range(19)) - ({7} if pad == "[PAD]" else set())
    assert set(inputs.tolist()) == wanted


@pytest.mark.parametrize("name", ["classifier", "bert"])
def test_the_token_that_ends_texts_learns(name: str) -> None:
    build, settings = NETS[name]
    net = build(attention=partial(Dense), padding=FILLS, **SIZE, **settings)
    net(texts(FILLS)).square().sum().backward()
    (weight,) = [p for n, p in net.named_parameters() if n.endswith("embedding.weight") or "word_embeddings" in n]
    assert weight.grad is not None
    assert weight.grad[3].abs().sum() > 0
    assert weight.grad[0].abs().sum() == 0  # what fills up is read there, and hidden


@pytest.mark.parametrize("own", [3, None])
@pytest.mark.parametrize("kind", ["GPT2ForSequenceClassification", "LlamaForCausalLM"])
def test_what_is_saved_pads_with_what_it_did(tmp_path: Path, kind: str, own: int | None) -> None:
    torch.manual_seed(0)
    make, size = (transformers.GPT2Config, GPT) if "GPT2" in kind else (transformers.LlamaConfig, BERT)
    config = make(vocab_size=19, pad_token_id=own, eos_token_id=3, bos_token_id=2, **size)
    getattr(transformers, kind)(config).save_pretrained(tmp_path / "before")
    task = {"num_classes": 2} if "GPT2" in kind else {"objective": "causal"}
    load = partial(huggingface_model, attention=partial(Dense), name_or_path=str(tmp_path / "before"), pretrained=True)
    net = load(padding=FILLS, **SIZE, **task).eval()
    tokens = texts(FILLS)
    tokens[0, 11] = tokens[1, 7] = tokens[2, 8] = 5  # a plain model does not read ends that are its own padding
    found = net(tokens)
    assert net.model.config.pad_token_id == own
    densify(net)
    net.model.save_pretrained(tmp_path / "after")
    again = getattr(transformers, kind).from_pretrained(tmp_path / "after").eval()
    assert again.config.pad_token_id == own
    alone = [again(input_ids=row[row != FILLS][None]).logits[0] for row in tokens]
    assert_close([row[: len(one)] if one.dim() > 1 else row for row, one in zip(found, alone, strict=True)], alone)


def test_positions_of_a_trained_roberta_count_what_is_visible(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(vocab_size=19, num_labels=2, pad_token_id=1, eos_token_id=3, **BERT)
    )
    saved.save_pretrained(tmp_path)
    load = partial(huggingface_model, attention=partial(Dense), name_or_path=str(tmp_path), pretrained=True, **SIZE)
    separate, filled = (load(num_classes=2, padding=padding).eval() for padding in (1, FILLS))
    assert_close(filled(texts(FILLS)), separate(texts(1)))
    ones = texts(FILLS).masked_fill(texts(FILLS) == 3, 1)  # the id that its own tokenizer pads with
    assert filled(ones).isfinite().all()
    assert not torch.allclose(filled(ones), filled(texts(FILLS)))
