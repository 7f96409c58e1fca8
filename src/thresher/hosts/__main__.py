"""Print the table of docs/hosts.md: `python -m thresher.hosts` tries every mechanism in every host.

With arguments the command shows the mechanisms of one model; its code is in `thresher.tools.hosts`.
"""

import copy
import runpy
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
import transformers
from torch import Tensor, nn

from thresher.attention import available
from thresher.console import accept_any_text, end_command
from thresher.hosts import mounted, sparsify

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
TEXT = SIZE | {"vocab_size": 64, "max_position_embeddings": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 10,
}
TOKENS = torch.arange(3, 17).view(2, 7)
PAIR = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5]}
PICTURES = torch.linspace(-1, 1, 2 * 3 * 256).view(2, 3, 16, 16).sin()


class Model(NamedTuple):
    """A small model to mount mechanisms into.

    Attributes:
        build: Builds the model.
        inputs: Example inputs.
        recorded: Whether its attention is found only by example inputs.
        parts: Its kinds of attention, with a regular expression for the names of their modules.
    """

    build: Callable[[], nn.Module]
    inputs: Any
    recorded: bool = False
    parts: dict[str, str] = {"": "."}


def _hub_builder(name: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """Build a constructor of a model of transformers from its configuration, with random weights."""
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | settings
    return lambda: getattr(transformers, name)(getattr(transformers, f"{config}Config")(**known))


def _timm_builder(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **IMAGE, **settings)


def _build_encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 40, 0.0, batch_first=True), 2)


def _build_decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 40, 0.0, batch_first=True), 2)


SEQ2SEQ = {"vocab_size": 64, "d_model": 32, "decoder_start_token_id": 0, "dropout": 0.0}
BART = SEQ2SEQ | {
    f"{side}_{what}": n
    for side in ("encoder", "decoder")
    for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 40))
}
T5 = SEQ2SEQ | {"d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
MODELS = {
    "BERT": Model(_hub_builder("BertForMaskedLM", "Bert", **TEXT, **NO_DROPOUT), {"input_ids": TOKENS}),
    "RoBERTa": Model(_hub_builder("RobertaForMaskedLM", "Roberta", **TEXT, **NO_DROPOUT), {"input_ids": TOKENS}),
    "DistilBERT": Model(
        _hub_builder(
            "DistilBertModel",
            "DistilBert",
            vocab_size=64,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=40,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        {"input_ids": TOKENS},
    ),
    "ViT": Model(
        _hub_builder("ViTForImageClassification", "ViT", **SIZE, **NO_DROPOUT, image_size=16, patch_size=4),
        {"pixel_values": PICTURES},
    ),
    "GPT-2": Model(
        _hub_builder(
            "GPT2LMHeadModel",
            "GPT2",
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        ),
        {"input_ids": TOKENS},
    ),
    "Llama": Model(_hub_builder("LlamaForCausalLM", "Llama", **TEXT, num_key_value_heads=2), {"input_ids": TOKENS}),
    "Qwen3": Model(
        _hub_builder("Qwen3ForCausalLM", "Qwen3", **TEXT, num_key_value_heads=2, head_dim=8), {"input_ids": TOKENS}
    ),
    "T5": Model(
        _hub_builder("T5ForConditionalGeneration", "T5", **T5),
        PAIR,
        parts={"encoder": "encoder", "decoder": r"decoder.*\.SelfAtt", "cross": "EncDec"},
    ),
    "BART": Model(
        _hub_builder("BartForConditionalGeneration", "Bart", **BART),
        PAIR,
        parts={"encoder": r"encoder\.layers", "decoder": r"decoder.*self_attn", "cross": "encoder_attn"},
    ),
    "timm ViT": Model(_timm_builder("vit_tiny_patch16_224"), PICTURES),
    "timm EVA": Model(_timm_builder("eva02_tiny_patch14_224"), PICTURES, recorded=True),
    "timm BEiT": Model(_timm_builder("beit_base_patch16_224"), PICTURES, recorded=True),
    "nn.TransformerEncoder": Model(_build_encoder, torch.linspace(-1, 1, 448).view(2, 7, 32).sin()),
    "nn.TransformerDecoder": Model(
        _build_decoder,
        {
            "tgt": torch.linspace(-1, 1, 320).view(2, 5, 32).sin(),
            "memory": torch.linspace(-1, 1, 448).view(2, 7, 32).cos(),
            "tgt_mask": torch.ones(5, 5, dtype=torch.bool).triu(1),
            "tgt_is_causal": True,
        },
        recorded=True,
        parts={"decoder": "self_attn", "cross": "multihead_attn"},
    ),
}


def build(name: str) -> nn.Module:
    """Build a model in evaluation mode, with weights that make its attention far from uniform."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = MODELS[name].build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def compute_output(model: nn.Module, inputs: Any) -> Tensor:
    """Compute the first output of a model."""
    out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out if isinstance(out, Tensor) else out[0]


def attempt(name: str, model: nn.Module, attention: str, where: str) -> str:
    """Mount a mechanism into a copy of a model and train one step; return the reason if that is refused."""
    example, copied = MODELS[name], copy.deepcopy(model)
    try:
        sparsify(copied, attention, where=where, example_inputs=example.inputs if example.recorded else None)
    except ValueError as error:
        return str(error)
    optimiser = torch.optim.SGD([p for p in copied.train().parameters() if p.requires_grad], lr=1e-3)
    loss = compute_output(copied, example.inputs).square().mean()
    loss.backward()
    optimiser.step()
    if not all(parameter.isfinite().all() for parameter in (loss, *copied.parameters())):
        raise RuntimeError(f"{attention} in {name} is not finite after a step")
    return ""


def build_table() -> str:
    """Build the table as Markdown, with the reasons of refusals below it."""
    names, reasons = available(), []
    rows = [("model", "attention", "host", *(f"`{name}`" for name in names)), ("---",) * (3 + len(names))]
    for name, example in MODELS.items():
        model = build(name)
        for part, where in example.parts.items():
            probe = copy.deepcopy(model)
            sparsify(probe, "dense", where=where, example_inputs=example.inputs if example.recorded else None)
            host, _, kind = next(iter(mounted(probe).values())).rstrip(")").partition(": ")
            cells = []
            for attention in names:
                reason = attempt(name, model, attention, where)
                if reason and reason not in reasons:
                    reasons.append(reason)
                cells.append(f"no [{reasons.index(reason) + 1}]" if reason else "yes")
            rows.append((f"{name}{' ' * bool(part)}{part}", kind.rpartition(", ")[2].replace("_", " "), host, *cells))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *(f"{n}. {reason}" for n, reason in enumerate(reasons, 1))])


if __name__ == "__main__":
    accept_any_text()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if sys.argv[1:]:
        runpy.run_module("thresher.tools.hosts", run_name="__main__")
    end_command(lambda: print(build_table()))
