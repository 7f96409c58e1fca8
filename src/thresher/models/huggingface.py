"""Models of transformers as trainable networks: token ids in, logits out, with another attention."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from jaxtyping import Float, Int64
from safetensors import SafetensorError
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

from thresher.attention.mechanism import MakeMechanism
from thresher.config.packages import locate_model
from thresher.hosts import inject
from thresher.hosts.huggingface.saving import from_pretrained
from thresher.hosts.huggingface.switch import NAME
from thresher.models.heads import load_classifier
from thresher.models.transformer import find_after_first

HEADS: Mapping[str, Any] = {
    "classification": AutoModelForSequenceClassification,
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "denoising": AutoModelForSeq2SeqLM,
}
POSITIONS_FROM_IDS = "create_position_ids_from_inputs_embeds"  # of the embeddings of RoBERTa and its kin
NAMES_CODE = ("attn_implementation", "auto_map", "experts_implementation", "quantization_config")


class HuggingFaceNet(nn.Module):
    """A model of transformers that takes token ids only and masks padding.

    Args:
        model: A model with logits.
        padding: Token id of padding; negative if every id of the vocabulary is a token.
        separator: Token id whose first occurrence ends the first text of a pair; used for the `token_type_ids` of
            models that have them.
    """

    def __init__(self, model: nn.Module, padding: int, separator: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.padding = padding
        self.separator = separator if _has_types(model) else None

    def forward(self, tokens: Int64[Tensor, "b n"], target: Int64[Tensor, "b m"] | None = None) -> Tensor:
        """Compute logits; an encoder-decoder also takes the tokens before each target."""
        decoder = {} if target is None else {"decoder_input_ids": target}
        inputs = _build_inputs(self.model, tokens, self.padding, self.separator)
        with _set_padding_id(self.model.config, self.padding):
            logits: Tensor = self.model(**inputs, **decoder).logits
        return logits


@contextmanager
def _set_padding_id(config: Any, padding: int) -> Iterator[None]:
    """Set a negative padding id in the config, for heads that read the last token; restore it afterwards."""
    if padding >= 0:
        yield
        return
    configs = [config, config.get_text_config()]
    own = [each.pad_token_id for each in configs]
    try:
        for each in configs:
            each.pad_token_id = padding
        yield
    finally:
        for each, value in zip(configs, own, strict=True):
            each.pad_token_id = value


def _has_types(model: nn.Module) -> bool:
    taken = "token_type_ids" in inspect.signature(model.forward).parameters
    return taken and getattr(model.config, "type_vocab_size", 0) > 1


def _build_inputs(model: nn.Module, tokens: Tensor, padding: int, separator: int | None) -> dict[str, Tensor]:
    visible = tokens != padding
    inputs = {"input_ids": tokens, "attention_mask": visible}
    if separator is not None:
        inputs["token_type_ids"] = (find_after_first(separator, tokens) & visible).long()
    counting = [m for m in model.modules() if hasattr(m, POSITIONS_FROM_IDS)] if padding < 0 else []
    if counting:  # by default these models skip tokens with that id when they count positions
        inputs["position_ids"] = visible.cumsum(1) * visible + int(counting[0].padding_idx)  # type: ignore[arg-type]
    return inputs


def _pad_with_no_token(model: Any) -> None:
    """Let the embeddings of a model accept a negative padding id."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # that row belongs to a token and is trained
            module.register_forward_pre_hook(_replace_padding)
        elif hasattr(module, POSITIONS_FROM_IDS) and module.padding_idx is None:
            module.padding_idx = 0


def _replace_padding(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.clamp_min(0) if isinstance(x, Tensor) else x for x in inputs)


def huggingface_model(
    *,
    attention: MakeMechanism,
    vocabulary: int,
    length: int,
    padding: int,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    separator: int | None = None,
    objective: str | None = None,
    name_or_path: str = "bert",
    pretrained: bool = False,
    where: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a model of transformers with another attention and a head for the data.

    A trained classifier keeps the rows of its head whose class names match the data, in the order of the data; other
    rows are new. The log names them.

    Args:
        attention: Builds one mechanism for each attention module.
        vocabulary: Number of token ids.
        length: Largest number of tokens.
        padding: Token id of padding; negative if every id of the vocabulary is a token.
        num_classes: Number of logits of a classifier.
        class_names: Names of the classes, in the order of the logits.
        separator: Token id between the two texts of a pair, for models with token types.
        objective: Objective of a language model: "causal", "masked" or "denoising".
        name_or_path: A folder with the files of a model, a GGUF file (Llama and others; weights are dequantised),
            `package:NAME/PATH` inside an installed package, a name on the hub, or, for random weights, a kind of model
            such as "bert".
        pretrained: Whether to load weights; otherwise the configuration alone is used.
        where: Regular expression for the names of the attention modules to replace; all by default.
        config: Entries of the configuration to set.

    Raises:
        ValueError: There is no such model, an entry of its configuration is unknown, or it is too small for the data.
        FileNotFoundError: The files of the model are neither local nor on the hub.
    """
    settings = dict(config or {})
    auto = HEADS[objective or "classification"]
    size = {"vocabulary": vocabulary, "length": length, "padding": padding}
    model = _load_model(auto, name_or_path, pretrained, settings, num_classes, class_names, **size)
    net = HuggingFaceNet(model, padding, separator)
    with _set_padding_id(model.config, padding):
        inject(net, attention, where=where)
    return net


class SentenceEncoder(nn.Module):
    """The mean of the last hidden states of a model of transformers; padding is masked.

    Args:
        model: A model with a last hidden state.
        padding: Token id of padding; negative if every id of the vocabulary is a token.
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
        inputs = _build_inputs(self.model, tokens, self.padding, self.separator)
        visible = inputs["attention_mask"]
        states = self.model(**inputs).last_hidden_state
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
    """Build a model of transformers that maps a text to the mean of its token states, or classifies by it.

    Arguments and errors are those of `huggingface_model`; without `num_classes` outputs are embeddings.
    """
    size: dict[str, Any] = {"vocabulary": vocabulary, "length": length, "padding": padding}
    model = _load_model(AutoModel, name_or_path, pretrained, dict(config or {}), **size)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # it reads the first token only and is not used
    net = SentenceEncoder(model, padding, num_classes, separator)
    inject(net, attention, where=where)
    return net


def build_bare_model(name: str) -> Any:
    """Build a model of transformers from its configuration, with random weights and without a head.

    Raises:
        FileNotFoundError: See `huggingface_model`; `name` is its `name_or_path`.
        ValueError: The configuration names code to load.
    """
    return AutoModel.from_config(_load_config(*locate_model(name), False, {}), trust_remote_code=False)


def load_local_model(folder: Path) -> Any:
    """Load a model of transformers from a folder as it was saved, with the mechanisms in it; nothing is downloaded.

    Raises:
        FileNotFoundError: There is no such folder, or it lacks the weights.
        ValueError: It names code to load, or no class of transformers, or its weights are damaged.
    """
    config = _load_config(str(folder), {}, True, {})
    if hasattr(config, NAME):
        return from_pretrained(str(folder), local_files_only=True).eval()
    (architecture,) = config.architectures or [""]
    build = getattr(transformers, architecture, None)
    if not (isinstance(build, type) and issubclass(build, transformers.PreTrainedModel)):
        raise ValueError(f"{folder} names {architecture or 'nothing'} as its architecture, not a model of transformers")
    try:
        return build.from_pretrained(folder, config=config, local_files_only=True, use_safetensors=True).eval()
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"the weights in {folder} cannot be loaded: {error}") from error


def _load_model(
    auto: Any,
    name: str,
    pretrained: bool,
    settings: dict[str, Any],
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    *,
    vocabulary: int,
    length: int,
    padding: int,
) -> Any:
    name, file = locate_model(name)
    named = {"num_labels", "id2label", "label2id"} & settings.keys()
    if named and (pretrained or settings.get("num_labels", num_classes) != num_classes):
        raise ValueError(f"model.config.{min(named)} follows from the data, whose classes are those of the model")
    settings = {key: value for key, value in settings.items() if key not in named}  # entries of a rebuilt checkpoint
    if num_classes is not None and not pretrained:
        settings = settings | {"num_labels": num_classes}
    if padding >= 0:
        settings = settings | {"pad_token_id": padding}
    elif not pretrained:
        settings = settings | {"pad_token_id": None}
    built = _load_config(name, file, pretrained, settings)
    if not pretrained:
        built.vocab_size = vocabulary
    _check_size(built, name, vocabulary, length)
    build = partial(auto.from_config, trust_remote_code=False)
    if pretrained:
        files: dict[str, Any] = file or {"use_safetensors": True}
        load = partial(auto.from_pretrained, name, trust_remote_code=False, **files)
        if num_classes is None:
            model = load(config=built)
        else:
            with_report = partial(load, output_loading_info=True)
            model = load_classifier(lambda c, **o: with_report(config=c, **o), build, built, num_classes, class_names)
        model.train()  # transformers loads in evaluation mode, without dropout
    else:
        model = build(built)
    if class_names is not None:
        model.config.id2label = dict(enumerate(class_names))
        model.config.label2id = {class_name: i for i, class_name in enumerate(class_names)}
    if padding < 0:
        _pad_with_no_token(model)
    return model


def _load_config(name: str, file: dict[str, str], pretrained: bool, settings: dict[str, Any]) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[name] if not pretrained and name in CONFIG_MAPPING else None
    if kind is not None:
        built: PreTrainedConfig = kind()
    else:
        try:
            local = Path(name).is_dir()
            built = AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False, **file)
        except (OSError, ValueError) as error:
            kinds = "" if pretrained else f", or a kind of model ({', '.join(list(CONFIG_MAPPING)[:6])}, ...)"
            raise FileNotFoundError(
                f"there is no model {name!r}: model.name_or_path names a folder with config.json and safetensors, "
                f"a GGUF file, a model on the hub{kinds}"
            ) from error
    if unknown := [key for key in settings if not hasattr(built, key)]:
        raise ValueError(f"{type(built).__name__} has no entry {', '.join(unknown)}, which model.config sets")
    if code := [key for key in settings if key.startswith("_") or key in NAMES_CODE]:
        raise ValueError(f"model.config.{code[0]} would name code to load, which no config may")
    if kind is not None:
        built = kind(**settings)  # so that dependent entries, such as the size of a head, follow
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
