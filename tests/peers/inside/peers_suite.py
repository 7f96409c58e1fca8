"""Small models of transformers' families, under the tests that transformers runs over every model.

transformers' source distribution has these tests (`tests/test_modeling_common.py`) but not the models that they run
over (`tests/models/`); these are built here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import TestCase

import torch
import transformers
from transformers import PreTrainedConfig

BATCH, TOKENS, WIDTH, HEADS, LAYERS, WORDS = 3, 7, 32, 4, 2, 99
IMAGE, PATCH, CHANNELS = 16, 8, 3
FRAMES, MELS = 30, 16
IMAGE_TOKEN = 4
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 37}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {"vocab_size": WORDS, "max_position_embeddings": 512, **SIZES, **SPECIAL}
CAUSAL = {**TEXT, "num_key_value_heads": 2, "head_dim": WIDTH // HEADS}
VISION = {"image_size": IMAGE, "patch_size": PATCH, "num_channels": CHANNELS, **SIZES}

Inputs = dict[str, torch.Tensor]


def words() -> Inputs:
    """Return tokens without special ones, all visible."""
    ids = torch.randint(5, WORDS, (BATCH, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pictures() -> Inputs:
    return {"pixel_values": torch.rand(BATCH, CHANNELS, IMAGE, IMAGE)}


def words_and_pictures() -> Inputs:
    return {**words(), **pictures()}


def two_texts() -> Inputs:
    target = words()
    return {**words(), "decoder_input_ids": target["input_ids"], "decoder_attention_mask": target["attention_mask"]}


def sound_and_words() -> Inputs:
    return {"input_features": torch.rand(BATCH, MELS, 2 * FRAMES), "decoder_input_ids": words()["input_ids"]}


def pictures_in_words() -> Inputs:
    """Return texts that begin with an image: as many tokens of it as the image has after pooling."""
    inputs = words_and_pictures()
    inputs["input_ids"][:, : (IMAGE // PATCH) ** 2] = IMAGE_TOKEN
    return {**inputs, "token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).long()}


@dataclass(frozen=True)
class Small:
    """A family's small models.

    Attributes:
        config: The class of their configuration, by name.
        classes: The models, by name.
        options: What the configuration is given.
        inputs: Makes a batch that all of them take.
        flags: What the tests ask of their class; None leaves a test out.
        trains: Whether all of the models have a loss.
    """

    config: str
    classes: tuple[str, ...]
    options: dict[str, Any]
    inputs: Callable[[], Inputs] = words
    flags: dict[str, Any] = field(default_factory=dict)
    trains: bool = True

    def configure(self) -> PreTrainedConfig:
        return getattr(transformers, self.config)(**self.options)


def _named(stem: str, *tasks: str) -> tuple[str, ...]:
    return (f"{stem}Model", *(f"{stem}For{task}" for task in tasks))


_CLIP_SHARED = {"projection_dim": WIDTH}
_SEQ2SEQ = {"is_encoder_decoder": True}
_BART_SIZES = {
    "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "vocab_size": WORDS,
}  # fmt: skip
_T5 = {"vocab_size": WORDS, "d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": 37, "num_layers": LAYERS,
       "num_heads": HEADS, "decoder_start_token_id": 0, **{k: SPECIAL[k] for k in ("pad_token_id",)}}  # fmt: skip
_GEMMA = {**CAUSAL, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
WITHOUT_WORDS = {"test_resize_embeddings": False, "test_model_get_set_embeddings": None}
MODELS: dict[str, Small] = {
    "bert": Small(
        "BertConfig",
        (*_named("Bert", "MaskedLM", "MultipleChoice"), "BertLMHeadModel"),
        {**TEXT, "type_vocab_size": 2},
    ),
    "roberta": Small("RobertaConfig", _named("Roberta", "MaskedLM"), TEXT),
    "modernbert": Small(
        "ModernBertConfig",
        _named("ModernBert", "MaskedLM"),
        {**TEXT, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
    ),
    "vit": Small(
        "ViTConfig",
        _named("ViT", "ImageClassification", "MaskedImageModeling"),
        {**VISION, "encoder_stride": PATCH},
        pictures,
        WITHOUT_WORDS,
    ),
    "dinov2": Small(
        "Dinov2Config",
        ("Dinov2Model", "Dinov2ForImageClassification", "Dinov2Backbone"),
        VISION,
        pictures,
        {**WITHOUT_WORDS, "test_all_params_have_gradient": False},
    ),
    "clip": Small(
        "CLIPConfig",
        ("CLIPModel",),
        {"text_config": TEXT, "vision_config": {**VISION, **_CLIP_SHARED}, **_CLIP_SHARED},
        words_and_pictures,
        {
            "test_resize_embeddings": False,
            "has_attentions": False,
            "_is_composite": True,
            "test_hidden_states_output": None,
        },
    ),
    "clip_text": Small(
        "CLIPTextConfig", ("CLIPTextModel", "CLIPTextModelWithProjection"), {**TEXT, **_CLIP_SHARED}, trains=False
    ),
    "clip_vision": Small(
        "CLIPVisionConfig",
        ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
        {**VISION, **_CLIP_SHARED},
        pictures,
        WITHOUT_WORDS,
        trains=False,
    ),
    "bart": Small(
        "BartConfig",
        _named("Bart", "ConditionalGeneration"),
        {**_BART_SIZES, **SPECIAL, "decoder_start_token_id": 2, "forced_eos_token_id": None},
        two_texts,
        _SEQ2SEQ,
    ),
    "t5": Small("T5Config", _named("T5", "ConditionalGeneration"), _T5, two_texts, _SEQ2SEQ),
    "t5_encoder": Small("T5Config", ("T5EncoderModel",), {**_T5, "is_encoder_decoder": False}, trains=False),
    "gpt2": Small(
        "GPT2Config",
        ("GPT2Model", "GPT2LMHeadModel"),
        {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_inner": 37, **SPECIAL},
    ),
    "llama": Small("LlamaConfig", _named("Llama", "CausalLM"), CAUSAL),
    "mistral": Small("MistralConfig", _named("Mistral", "CausalLM"), {**CAUSAL, "sliding_window": 5}),
    "qwen3": Small("Qwen3Config", _named("Qwen3", "CausalLM"), CAUSAL),
    "opt": Small(
        "OPTConfig",
        _named("OPT", "CausalLM"),
        {**{k: v for k, v in TEXT.items() if k != "intermediate_size"}, "ffn_dim": 37, "word_embed_proj_dim": WIDTH},
    ),
    "whisper": Small(
        "WhisperConfig",
        _named("Whisper", "ConditionalGeneration"),
        {
            **_BART_SIZES,
            **SPECIAL,
            "num_mel_bins": MELS,
            "max_source_positions": FRAMES,
            "max_target_positions": 40,
            "decoder_start_token_id": 3,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        sound_and_words,
        {**_SEQ2SEQ, "test_resize_embeddings": False},
        trains=False,
    ),
    "gemma3_text": Small("Gemma3TextConfig", ("Gemma3TextModel", "Gemma3ForCausalLM"), _GEMMA),
    "gemma3": Small(
        "Gemma3Config",
        _named("Gemma3", "ConditionalGeneration"),
        {
            "text_config": _GEMMA,
            "vision_config": VISION,
            "mm_tokens_per_image": (IMAGE // PATCH) ** 2,
            "image_token_id": IMAGE_TOKEN,
            "boi_token_index": 5,
            "eoi_token_index": 6,
        },
        pictures_in_words,
        {"_is_composite": True, "test_resize_embeddings": False, "test_all_params_have_gradient": False},
    ),
}


class Tester(SimpleNamespace):
    """What transformers' tests ask of a family: sizes, configurations and inputs."""

    def __init__(self, small: Small) -> None:
        super().__init__(
            batch_size=BATCH, seq_length=TOKENS, is_training=small.trains, hidden_size=WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_choices=2, pad_token_id=0, image_size=IMAGE, patch_size=PATCH,
            mask_length=(IMAGE // PATCH) ** 2, num_masks=2,
        )  # fmt: skip
        self.small = small
        if small.inputs is pictures:
            self.seq_length = self.encoder_seq_length = 1 + (IMAGE // PATCH) ** 2
        if small.inputs is sound_and_words:
            self.encoder_seq_length = FRAMES

    def get_config(self) -> PreTrainedConfig:
        return self.small.configure()

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, Inputs]:
        return self.small.configure(), self.small.inputs()


def case(family: str) -> type:
    """Return the test case of a family: transformers' common tests over its small models."""
    from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin

    small = MODELS[family]
    classes = tuple(getattr(transformers, name) for name in small.classes)
    generates = any(model.can_generate() for model in classes)
    parents = (ModelTesterMixin, GenerationTesterMixin, TestCase) if generates else (ModelTesterMixin, TestCase)

    def set_up(self: Any) -> None:
        self.model_tester = Tester(small)

    members = {"setUp": set_up, "all_model_classes": classes}
    return type(f"{family.title().replace('_', '')}ModelTest", parents, members | small.flags)
