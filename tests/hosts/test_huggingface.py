"""Mechanisms inside models of transformers: masks, patterns and precisions mean what they meant before."""

import contextlib
import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

from tests.hosts.language_models import FIRST, PADDED, SECOND, TEXT
from tests.hosts.models import same_state
from tests.hosts.spy import Spy
from thresher import densify, inject, sparsify
from thresher.attention import Mechanism, Pattern, available
from thresher.hosts import mounted
from thresher.hosts.__main__ import MODELS, PAIR, TOKENS, build
from thresher.hosts.examples import build_example_inputs
from thresher.hosts.recording import call_model


def padded(name: str, side: str, ids: Tensor = TOKENS) -> dict[str, Tensor]:
    """Return inputs with padding; encoder-decoders have it on both sides, which are of different lengths."""
    mask = PADDED[side]
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name in ("T5", "BART"):
        short = slice(0, 5) if side == "right" else slice(2, 7)
        return inputs | {"decoder_input_ids": ids[:, short], "decoder_attention_mask": mask[:, short]}
    # RoBERTa numbers its positions by what is no padding token; the content of padding must not matter here.
    return inputs | ({"position_ids": torch.arange(2, 9).expand(2, 7)} if name == "RoBERTa" else {})


def real_outputs(name: str, side: str, model: nn.Module, ids: Tensor = TOKENS) -> Tensor:
    inputs = padded(name, side, ids)
    shown = inputs.get("decoder_attention_mask", inputs["attention_mask"])
    return model(**inputs)[0][shown.bool()]


@pytest.mark.parametrize("side", PADDED)
@pytest.mark.parametrize("name", TEXT)
def test_dense_changes_no_real_token(name: str, side: str) -> None:
    plain, hosted = build(name), build(name)
    names = sparsify(hosted, "dense")
    assert set(mounted(hosted)) == set(names)
    assert same_state(hosted, plain)
    assert_close(real_outputs(name, side, hosted), real_outputs(name, side, plain), atol=1e-5, rtol=1e-5)
    assert_close(
        call_model(hosted, MODELS[name].inputs)[0], call_model(plain, MODELS[name].inputs)[0], atol=1e-5, rtol=1e-5
    )


def test_dense_changes_no_image() -> None:
    plain, hosted = build("ViT"), build("ViT")
    sparsify(hosted, "dense")
    assert torch.equal(call_model(hosted, MODELS["ViT"].inputs)[0], call_model(plain, MODELS["ViT"].inputs)[0])


@pytest.mark.parametrize("attention", available())
@pytest.mark.parametrize("name", TEXT)
def test_the_content_of_padding_changes_no_real_token(name: str, attention: str) -> None:
    model = build(name)
    for where in MODELS[name].parts.values():
        with contextlib.suppress(ValueError):  # the table in docs/hosts.md says who refuses what
            sparsify(model, attention, where=where)
    for side in ("left", "right"):
        ids = torch.where(PADDED[side].bool(), TOKENS, TOKENS.flip(1) + 20)
        assert torch.equal(real_outputs(name, side, model), real_outputs(name, side, model, ids)), side


def test_each_kind_of_attention_has_a_mechanism_of_its_own_and_its_pattern() -> None:
    for name in ("T5", "BART"):
        model = build(name)
        hosts = [model.get_submodule(place).mechanism for place in sparsify(model, "latte")]
        kinds = [mechanism.pattern for mechanism in hosts]
        assert kinds[:2] == [Pattern.NONCAUSAL_SELF] * 2
        assert kinds[2:] == [Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS] * 2
        assert len(set(hosts)) == 6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TEXT)
def test_padding_stays_of_linear_size_and_hides_queries_too(name: str, side: str) -> None:
    model = build(name)
    inject(model, Spy)
    Spy.calls.clear()
    inputs = padded(name, side)
    model(**inputs)
    assert Spy.calls
    for call in Spy.calls:
        assert call.pairs is None
        assert call.keys is not None
    assert torch.equal(Spy.calls[0].keys, inputs["attention_mask"].bool())
    assert torch.equal(Spy.calls[0].queries, inputs["attention_mask"].bool())


@pytest.mark.parametrize("where", [FIRST, SECOND])
@pytest.mark.parametrize("side", PADDED)
@pytest.mark.parametrize("name", TEXT)
def test_layers_left_out_attend_as_before(name: str, side: str, where: str) -> None:
    plain, hosted = build(name), build(name)
    sparsify(hosted, "dense", where=where)
    assert_close(real_outputs(name, side, hosted), real_outputs(name, side, plain), atol=1e-5, rtol=1e-5)


def test_packed_sequences_do_not_see_each_other() -> None:
    plain, hosted = build("Llama"), build("Llama")
    sparsify(hosted, "dense")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(2, 7)
    got = hosted(TOKENS, position_ids=positions, use_cache=False)[0]
    assert_close(got, plain(TOKENS, position_ids=positions, use_cache=False)[0], atol=1e-5, rtol=1e-5)
    assert_close(got[:, 3:], hosted(TOKENS[:, 3:])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", PADDED)
def test_a_sliding_window_stays_one(side: str) -> None:
    settings = dict(MODELS["Llama"].build().config.to_dict())
    config = transformers.MistralConfig(**settings | {"sliding_window": 3, "model_type": "mistral"})
    torch.manual_seed(0)
    plain = transformers.MistralForCausalLM(config).eval()
    hosted = copy.deepcopy(plain)
    sparsify(hosted, "dense")
    wanted = real_outputs("Mistral", side, plain)
    assert_close(real_outputs("Mistral", side, hosted), wanted, atol=1e-5, rtol=1e-5)
    hosted.config.sliding_window = None
    assert not torch.allclose(real_outputs("Mistral", side, hosted), wanted)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_whole_mask_of_the_users_is_obeyed(kind: str) -> None:
    plain, hosted = build("BERT"), build("BERT")
    sparsify(hosted, "dense")
    mask = ((torch.arange(49).view(1, 1, 7, 7) % 3) > 0) | torch.eye(7).bool()
    mask = mask.expand(2, 1, 7, 7)
    if kind == "additive":
        mask = torch.zeros(2, 1, 7, 7).masked_fill(~mask, torch.finfo(torch.float32).min)
    wanted = plain(TOKENS, attention_mask=mask)[0]
    assert_close(hosted(TOKENS, attention_mask=mask)[0], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["BERT", "Llama", "T5", "BART"])
def test_gradients_are_the_same_with_gradient_checkpointing(name: str) -> None:
    grads = []
    for checkpointed in (False, True):
        model = build(name)
        sparsify(model, "latte", threshold=0.5)
        if checkpointed:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        call_model(model.train(), MODELS[name].inputs | {"use_cache": False})[0].square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert all(grad is not None for n, grad in grads[1].items() if "thresholds" in n)
    for parameter, grad in grads[0].items():
        assert_close(grads[1][parameter], grad)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # DeBERTa's, in transformers 5.20
@pytest.mark.parametrize(
    ("model", "config", "settings"),
    [
        ("DebertaV2Model", "DebertaV2Config", {}),
        ("LongformerModel", "LongformerConfig", {"attention_window": 4}),
    ],
)
def test_a_model_that_does_not_ask_the_registry_is_refused_by_name(
    model: str, config: str, settings: dict[str, Any]
) -> None:
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    built = getattr(transformers, model)(getattr(transformers, config)(**size, **settings)).eval()
    with pytest.raises(ValueError, match=rf"{model} does not call transformers' AttentionInterface"):
        sparsify(built, "latte")


def test_the_models_that_the_docs_call_out_of_reach_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text()
    listed = re.findall(r"`([\w-]+)`", page[page.index("cannot be reached") : page.index("and some others")])
    assert len(listed) > 20
    if f"In transformers {'.'.join(transformers.__version__.split('.')[:2])} these" not in page:
        pytest.skip("the list is that of another version of transformers")
    models = {kind: transformers.MODEL_MAPPING[transformers.CONFIG_MAPPING[kind]] for kind in listed}
    classes = {kind: found[0] if isinstance(found, tuple) else found for kind, found in models.items()}
    assert not [kind for kind, found in classes.items() if found._can_set_attn_implementation()]


def test_attention_of_another_kind_is_refused_by_name() -> None:
    """GPT-OSS adds a learned sink to every row, Gemma 2 caps its scores."""
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    size |= {"num_key_value_heads": 2, "intermediate_size": 40}
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**size)).eval()
    with pytest.raises(ValueError, match=r"^Gemma2Attention attends with softcap, which no mechanism supports"):
        sparsify(model, "dense")


SIDES = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))}
SEQ2SEQ = SIDES | {"vocab_size": 64, "d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}


@pytest.mark.parametrize("where", [None, "encoder_attn"])
def test_a_model_that_adds_some_masks_by_itself_is_refused(where: str | None) -> None:
    """BigBirdPegasus' encoder does not ask the registry, its decoder does: one kind of mask cannot serve both."""
    config = transformers.BigBirdPegasusConfig(**SEQ2SEQ, attention_type="original_full")
    model = transformers.BigBirdPegasusModel(config).eval()
    tokens = torch.arange(3, 17).view(2, 7)
    padded = {"input_ids": tokens, "attention_mask": tokens < 14, "decoder_input_ids": tokens[:, :5]}
    before = model(**padded)[0]
    with pytest.raises(ValueError, match=r"BigBirdPegasusModel attends in part without asking .* would see padding"):
        sparsify(model, "dense", where=where)
    assert torch.equal(model(**padded)[0], before)


def test_attention_that_denies_that_it_is_causal_is_refused_with_what_helps() -> None:
    plain = transformers.NllbMoeModel(transformers.NllbMoeConfig(**SEQ2SEQ)).eval()
    model = copy.deepcopy(plain)
    with pytest.raises(ValueError, match=r"NllbMoeAttention is given masks that hide the future and has is_causal=Fal"):
        sparsify(model, "dense")
    for name, module in model.named_modules():
        if name.endswith("self_attn") and name.startswith("decoder"):
            module.is_causal = True
    assert len(sparsify(model, "dense")) == 3
    tokens = torch.arange(3, 17).view(2, 7)
    for inputs in ({}, {"attention_mask": tokens < 14}):
        inputs |= {"input_ids": tokens, "decoder_input_ids": tokens[:, :5]}
        assert_close(model(**inputs)[0], plain(**inputs)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("AlbertModel", "AlbertConfig"),
        ("ModernBertModel", "ModernBertConfig"),
        ("GPTNeoXForCausalLM", "GPTNeoXConfig"),
        ("Dinov2Model", "Dinov2Config"),
        ("CLIPTextModel", "CLIPTextConfig"),
        ("SiglipVisionModel", "SiglipVisionConfig"),
    ],
)
def test_models_that_nobody_here_named_are_reached(model: str, config: str) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    text = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    image = {"image_size": 16, "patch_size": 4}
    settings = size | (image if "Dino" in model or "Vision" in model else text)
    torch.manual_seed(0)
    plain = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    hosted = copy.deepcopy(plain)
    inputs = build_example_inputs(plain)
    assert sparsify(hosted, "dense")
    assert_close(hosted(**inputs)[0], plain(**inputs)[0], atol=1e-5, rtol=1e-5)


def test_a_model_that_takes_something_else_asks_for_example_inputs() -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    vision = text | {"image_size": 16, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text | {"vocab_size": 64, "eos_token_id": 2}, vision_config=vision)
    model = transformers.CLIPModel(config).eval()
    inputs = {"input_ids": TOKENS, "pixel_values": MODELS["ViT"].inputs["pixel_values"]}
    wanted = model(**inputs).logits_per_text
    with pytest.raises(ValueError, match=r"CLIPModel could not be run.*give example_inputs"):
        sparsify(model, "dense")
    sparsify(model, "dense", example_inputs=inputs)
    assert [m.pattern for m in model.modules() if isinstance(m, Mechanism)] == [
        Pattern.CAUSAL_SELF,
        Pattern.NONCAUSAL_SELF,
    ]
    assert_close(model(**inputs).logits_per_text, wanted)


def test_a_model_that_does_not_say_how_large_its_images_are_asks_for_them() -> None:
    of_two_stages = {"depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "num_attention_heads": [1, 2]}
    patches = {"num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    torch.manual_seed(0)
    plain = transformers.SegformerModel(transformers.SegformerConfig(**of_two_stages, **patches)).eval()
    hosted = copy.deepcopy(plain)
    with pytest.raises(ValueError, match=r"SegformerModel takes pixel_values; give example_inputs, say"):
        sparsify(hosted, "dense")
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32)}
    assert len(sparsify(hosted, "dense", example_inputs=inputs)) == 2
    patterns = [m.pattern for m in hosted.modules() if isinstance(m, Mechanism)]
    assert patterns == [Pattern.NONCAUSAL_CROSS, Pattern.NONCAUSAL_SELF]  # the first reads every other token
    assert_close(hosted(**inputs)[0], plain(**inputs)[0], atol=1e-5, rtol=1e-5)


class Classifier(nn.Module):
    """A user's module around a model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = build("DistilBERT")
        self.head = nn.Linear(32, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(ids)[0][:, 0])


@pytest.mark.parametrize("example_inputs", [None, TOKENS, (TOKENS,), {"ids": TOKENS}], ids=str)
def test_a_model_inside_a_users_module_is_found(example_inputs: Any) -> None:
    model = Classifier().eval()
    wanted = model(TOKENS)
    assert sparsify(model, "dense", example_inputs=example_inputs) == [
        f"encoder.transformer.layer.{n}.attention" for n in range(2)
    ]
    assert_close(model(TOKENS), wanted)


def test_attention_dropout_is_passed_on_or_refused_at_build() -> None:
    def dropping() -> nn.Module:
        torch.manual_seed(0)
        config = MODELS["BERT"].build().config
        config.attention_probs_dropout_prob = 0.3
        return transformers.BertModel(config).train()

    plain, hosted = dropping(), dropping()
    sparsify(hosted, "dense")
    assert [m.dropout for m in hosted.modules() if isinstance(m, Mechanism)] == [0.3, 0.3]
    outputs = []
    for model in (plain, hosted):
        torch.manual_seed(1)
        outputs.append(model(TOKENS)[0])
    assert torch.equal(*outputs)
    assert torch.equal(plain.eval()(TOKENS)[0], hosted.eval()(TOKENS)[0])
    model = dropping()
    with pytest.raises(ValueError, match="attention dropout to 0"):
        sparsify(model, "yoso")
    assert same_state(model, plain)
    assert model.config._attn_implementation == "sdpa"
    assert not mounted(model)


def test_a_call_in_another_pattern_is_refused() -> None:
    model = build("BERT")
    sparsify(model, "dense")
    module = model.get_submodule(next(iter(mounted(model))))
    module.is_causal = True
    with pytest.raises(ValueError, match=r"mounted as noncausal_self and is called as causal"):
        model(TOKENS)


def test_one_forward_for_finding_leaves_mode_and_random_numbers_alone() -> None:
    model = build("BART").train()
    model.model.encoder.eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    sparsify(model, "dense")
    assert torch.equal(torch.get_rng_state(), state)
    densify(model)
    assert [m.training for m in model.modules()] == modes


def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs)[0].square().mean()


@pytest.mark.parametrize("make", [torch.bfloat16, torch.float64])
def test_other_precisions(make: torch.dtype) -> None:
    for name in ("Llama", "T5"):
        model = build(name).to(make)
        sparsify(model, "latte", threshold=1.0)
        assert loss(model, PAIR if name == "T5" else {"input_ids": TOKENS}).dtype == make
