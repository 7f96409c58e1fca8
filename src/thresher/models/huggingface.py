"""Models of transformers as networks to train: token ids in, logits out, with another attention inside."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from thresher.attention.base import MakeMechanism
from thresher.hosts import inject
from thresher.installed import located
from thresher.models.transformer import after_first

HEADS: Mapping[str, Any] = {
    "classification": AutoModelForSequenceClassification,
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "denoising": AutoModelForSeq2SeqLM,
}
NAMES_CODE = ("attn_implementation", "auto_map", "experts_implementation", "quantization_config")


class HuggingFaceNet(nn.Module):
    """A model of transformers that takes token ids alone; ids that are padding are masked.

    Args:
        model: Any model with logits.
        padding: The token id that stands for nothing.
        separator: The token id after whose first occurrence tokens are of the second text of a pair; a model that has
            an embedding for those (`token_type_ids`) is told.
    """

    def __init__(self, model: nn.Module, padding: int, separator: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.padding = padding
        self.separator = separator if _has_types(model) else None

    def forward(self, tokens: Int64[Tensor, "b n"], target: Int64[Tensor, "b m"] | None = None) -> Tensor:
        """Return logits; an encoder-decoder takes the tokens before each target, too."""
        decoder = {} if target is None else {"decoder_input_ids": target}
        types = _types(tokens, self.padding, self.separator)
        logits: Tensor = self.model(input_ids=tokens, attention_mask=tokens != self.padding, **types, **decoder).logits
        return logits


def _has_types(model: nn.Module) -> bool:
    taken = "token_type_ids" in inspect.signature(model.forward).parameters
    return taken and getattr(model.config, "type_vocab_size", 0) > 1


def _types(tokens: Tensor, padding: int, separator: int | None) -> dict[str, Tensor]:
    if separator is None:
        return {}
    return {"token_type_ids": (after_first(separator, tokens) & (tokens != padding)).long()}


def huggingface_model(
    *,
    attention: MakeMechanism,
    vocabulary: int,
    length: int,
    padding: int,
    num_classes: int | None = None,
    separator: int | None = None,
    objective: str | None = None,
    name_or_path: str = "bert",
    pretrained: bool = False,
    where: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a model of transformers with another attention and the head that the data ask for.

    Args:
        attention: Builds one mechanism for each attention module.
        vocabulary: Number of token ids.
        length: Largest number of tokens.
        padding: The token id that stands for nothing.
        num_classes: Number of logits of a classifier.
        separator: Of pairs of texts, the token id between the two, for models that tell their tokens apart.
        objective: Of a language model: "causal", "masked" or "denoising".
        name_or_path: A folder with a model's files, `package:NAME/FOLDER` for one inside an installed package, a name
            on the hub, or for random weights a kind of model: "bert".
        pretrained: Whether to load weights; otherwise the configuration alone is used.
        where: Regular expression for the names of the attention modules to replace; all by default.
        config: Entries of the configuration to set.

    Raises:
        ValueError: There is no such model, an entry of its configuration is unknown, or it is too small for the data.
        FileNotFoundError: The model's files are neither there nor, as far as the network reaches, on the hub.
    """
    settings = dict(config or {})
    if num_classes is not None:
        settings["num_labels"] = num_classes
    auto = HEADS[objective or "classification"]
    size = {"vocabulary": vocabulary, "length": length, "padding": padding}
    net = HuggingFaceNet(_model(auto, name_or_path, pretrained, settings, **size), padding, separator)
    inject(net, attention, where=where)
    return net


class SentenceEncoder(nn.Module):
    """The mean of the states that a model of transformers gives to a text's tokens; ids that are padding are masked.

    Args:
        model: Any model with a last hidden state.
        padding: The token id that stands for nothing.
        num_classes: Number of logits of a linear head on the mean; None returns the mean, scaled to length 1.
        separator: See `HuggingFaceNet`.
    """

    def __init__(self, model: Any, padding: int, num_classes: int | None = None, separator: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.padding = padding
        self.separator = separator if _has_types(model) else None
        self.head = None if num_classes is None else nn.Linear(model.config.hidden_size, num_classes)

    def forward(self, tokens: Int64[Tensor, "b n"]) -> Float[Tensor, "b c"]:
        visible = tokens != self.padding
        types = _types(tokens, self.padding, self.separator)
        states = self.model(input_ids=tokens, attention_mask=visible, **types).last_hidden_state
        mean = states.masked_fill(~visible[..., None], 0).sum(1) / visible.sum(1, keepdim=True).clamp_min(1)
        result: Tensor = F.normalize(mean, dim=-1) if self.head is None else self.head(mean)
        return result


def sentence_encoder(
    *,
    attention: MakeMechanism,
    vocabulary: int,
    length: int,
    padding: int,
    num_classes: int | None = None,
    separator: int | None = None,
    name_or_path: str = "sentence-transformers/all-MiniLM-L6-v2",
    pretrained: bool = True,
    where: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a model of transformers that turns a text into one vector, the mean over its tokens, or classifies by it.

    Arguments and errors are those of `huggingface_model`; without `num_classes` the result are embeddings.
    """
    size = {"vocabulary": vocabulary, "length": length, "padding": padding}
    model = _model(AutoModel, name_or_path, pretrained, dict(config or {}), **size)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # reads the first token alone, and nothing reads it here
    net = SentenceEncoder(model, padding, num_classes, separator)
    inject(net, attention, where=where)
    return net


def bare_model(name: str) -> Any:
    """Build a model of transformers without a head from its configuration alone, with random weights.

    Raises:
        FileNotFoundError: See `huggingface_model`, whose `name_or_path` this is.
        ValueError: Its configuration names code to load.
    """
    return AutoModel.from_config(_config(located(name), False, {}), trust_remote_code=False)


def _model(
    auto: Any, name: str, pretrained: bool, settings: dict[str, Any], *, vocabulary: int, length: int, padding: int
) -> Any:
    name = located(name)
    built = _config(name, pretrained, settings | {"pad_token_id": padding})
    if not pretrained:
        built.vocab_size = vocabulary
    _check_size(built, name, vocabulary, length)
    if pretrained:
        model = auto.from_pretrained(name, config=built, use_safetensors=True, trust_remote_code=False)
        return model.train()  # it comes in evaluation mode, in which its dropout would stay off in training
    return auto.from_config(built, trust_remote_code=False)


def _config(name: str, pretrained: bool, settings: dict[str, Any]) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[name] if not pretrained and name in CONFIG_MAPPING else None
    if kind is not None:
        built: PreTrainedConfig = kind()
    else:
        try:
            built = AutoConfig.from_pretrained(name, local_files_only=Path(name).is_dir(), trust_remote_code=False)
        except (OSError, ValueError) as error:
            kinds = "" if pretrained else f", or a kind of model ({', '.join(list(CONFIG_MAPPING)[:6])}, ...)"
            raise FileNotFoundError(
                f"there is no model {name!r}: model.name_or_path names a folder with config.json and safetensors, "
                f"a model on the hub{kinds}"
            ) from error
    if unknown := [key for key in settings if not hasattr(built, key)]:
        raise ValueError(f"{type(built).__name__} has no entry {', '.join(unknown)}, which model.config sets")
    if code := [key for key in settings if key.startswith("_") or key in NAMES_CODE]:
        raise ValueError(f"model.config.{code[0]} would name code to load, which no config may")
    if kind is not None:
        built = kind(**settings)  # so that what follows from them, such as the size of a head, does
    else:
        for key, value in settings.items():
            setattr(built, key, value)
    if "/" in str(built._attn_implementation):
        raise ValueError(f"{name} asks for attention code from the hub, {built._attn_implementation!r}: refused")
    return built


def _check_size(config: PreTrainedConfig, name: str, vocabulary: int, length: int) -> None:
    if config.vocab_size < vocabulary:
        raise ValueError(
            f"{name} knows {config.vocab_size} tokens, the tokenizer has {vocabulary}: "
            "set data.tokenizer to the model's own"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < length:
        raise ValueError(
            f"{name} has positions for {positions} tokens, the data have up to {length}: shorten them by data.length "
            "or data.context, or set model.config.max_position_embeddings where weights are not loaded"
        )
