"""Files of models of transformers hold every mechanism, of every host, or are refused by name."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.hosts.spy import Spy
from thresher import inject, sparsify
from thresher.attention import available, hyperparameters
from thresher.attention.latte.mechanism import Latte
from thresher.attention.shared.thresholds import IN_SPREADS, named_thresholds
from thresher.hosts import mounted
from thresher.hosts.__main__ import MODELS, NO_DROPOUT, PICTURES, TOKENS, build
from thresher.hosts.core import mount
from thresher.hosts.huggingface.host import from_pretrained
from thresher.hosts.recording import call_model

SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
IMAGE = {"image_size": 16, "patch_size": 4}
TIMM = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
ROWS = torch.arange(3, 35).view(2, 16)  # more tokens than a cluster of SMYRF's holds


def bert(**settings: Any) -> nn.Module:
    config = transformers.BertConfig(**SIZE | NO_DROPOUT | {"num_hidden_layers": 3, "vocab_size": 64})
    return transformers.BertModel(config, **settings)


def siglip() -> nn.Module:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZE, **IMAGE))


def clip() -> nn.Module:
    text = SIZE | {"vocab_size": 64, "eos_token_id": 2}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=SIZE | IMAGE))


def timm_model(architecture: str) -> nn.Module:
    return transformers.TimmWrapperModel(transformers.TimmWrapperConfig(architecture=architecture, model_args=TIMM))


BUILDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "BERT": (bert, {"input_ids": ROWS}),
    "BERT without a pooler": (partial(bert, add_pooling_layer=False), {"input_ids": ROWS}),
    "Llama": (MODELS["Llama"].build, {"input_ids": ROWS}),
    "BART": (MODELS["BART"].build, {"input_ids": ROWS, "decoder_input_ids": ROWS[:, :12]}),
    "ViT": (MODELS["ViT"].build, MODELS["ViT"].inputs),
    "SigLIP": (siglip, {"pixel_values": PICTURES}),
    "CLIP": (clip, {"input_ids": TOKENS, "pixel_values": PICTURES}),
    "timm ViT": (partial(timm_model, "vit_tiny_patch16_224"), {"pixel_values": PICTURES}),
    "timm EVA": (partial(timm_model, "eva02_tiny_patch14_224"), {"pixel_values": PICTURES}),
}


def make(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    build_it, inputs = BUILDS[name]
    return build_it().eval(), inputs


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        out = model(**inputs)
    wanted = ("logits", "last_hidden_state", "pooler_output", "logits_per_text")
    return [out[key] for key in wanted if isinstance(out.get(key), Tensor)]


def train(model: nn.Module) -> None:
    """Give thresholds values of their own, as training and calibration do."""
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("thresholds.offset", "thresholds.base", "thresholds.eval_base")):
            x.data += torch.linspace(0.1, 1.3, len(x))


def check_it_comes_back(model: nn.Module, inputs: dict[str, Tensor], path: Path, **kwargs: Any) -> nn.Module:
    wanted = outputs(model, inputs)
    model.save_pretrained(path, **kwargs.pop("saving", {}))
    loaded = from_pretrained(str(path), **kwargs)
    assert mounted(loaded) == mounted(model)
    assert type(loaded) is type(model)
    pairs = zip(outputs(loaded, inputs), wanted, strict=False)  # BERT gets a pooler of its own
    assert all(torch.equal(got, want) for got, want in pairs)
    return loaded


@pytest.mark.parametrize("attention", available())
@pytest.mark.parametrize("name", ["BERT without a pooler", "Llama", "BART", "ViT", "SigLIP"])
def test_every_mechanism_comes_back(name: str, attention: str, tmp_path: Path) -> None:
    model, inputs = make(name)
    where = "encoder_attn" if name == "BART" else None
    where = r"self_attn$" if attention == "none" and name in ("BART", "SigLIP") else where
    sparsify(model, attention, where=where, **({"allow_noncausal_budget": True} if attention == "mca" else {}))
    train(model)
    check_it_comes_back(model, inputs, tmp_path)


@pytest.mark.parametrize("attention", ["latte", "smyrf", "yoso", "mca"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_mechanisms_keep_in_fp32_stays_so_in_a_model_of_lower_precision(
    dtype: torch.dtype, attention: str, tmp_path: Path
) -> None:
    model, inputs = make("BERT")
    sparsify(model.to(dtype), attention)
    train(model)
    loaded = check_it_comes_back(model, inputs, tmp_path)
    assert loaded.dtype == dtype
    kept = {name: x for name, x in loaded.state_dict().items() if ".mechanism." in name}
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in kept.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thresholds_come_back_in_the_unit_that_they_took(dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = make("BERT without a pooler")
    sparsify(model.to(dtype), "latte", threshold=0.4)
    before = outputs(model, inputs)
    for _, thresholds in named_thresholds(model):
        thresholds.set_unit("nats", 0.35)
    assert not torch.equal(before[0], outputs(model, inputs)[0])
    loaded = check_it_comes_back(model, inputs, tmp_path)
    for _, thresholds in named_thresholds(loaded):
        assert thresholds.unit == "nats"
        assert thresholds.in_spreads.dtype is torch.bool
    recipes = loaded.config.thresher.values()
    assert {recipe["hyperparameters"]["unit"] for recipe in recipes} == {"nats"}


@pytest.mark.parametrize("unit", ["nats", "spread"])
def test_files_from_before_units_were_stored_have_that_of_their_recipe(unit: str, tmp_path: Path) -> None:
    model, inputs = make("BERT without a pooler")
    sparsify(model, "latte", threshold=0.4, unit=unit)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    old = {key: x for key, x in load_file(weights).items() if not key.endswith(IN_SPREADS)}
    save_file(old, weights, metadata={"format": "pt"})
    loaded = from_pretrained(str(tmp_path))
    assert torch.equal(outputs(loaded, inputs)[0], outputs(model, inputs)[0])
    assert {bool(each.in_spreads) for _, each in named_thresholds(loaded)} == {unit == "spread"}


def test_mechanisms_of_several_hosts_come_back_together(tmp_path: Path) -> None:
    model, inputs = make("SigLIP")
    assert sparsify(model, "latte", threshold=0.5)[-1] == "head.attention"
    check_it_comes_back(model, inputs, tmp_path / "siglip")
    for name, where in (("BERT", r"layer\.[12]"), ("Llama", None)):
        model, inputs = make(name)
        sparsify(model, "topk_ffn", keys=0.25)
        sparsify(model, "topk", keys=2, where=where)
        loaded = check_it_comes_back(model, inputs, tmp_path / name)
        assert {kind.partition(":")[0] for kind in mounted(loaded).values()} == {
            "FeedForwardHost",
            "HuggingFaceAttention",
        }


@pytest.mark.parametrize("name", ["timm ViT", "timm EVA"])
def test_models_of_timm_inside_transformers_come_back(name: str, tmp_path: Path) -> None:
    model, inputs = make(name)
    sparsify(model, "latte", threshold=0.5, example_inputs=inputs)
    check_it_comes_back(model, inputs, tmp_path)


def test_parts_that_were_sparsified_or_saved_alone_come_back(tmp_path: Path) -> None:
    model, inputs = build("BERT"), {"input_ids": TOKENS}
    sparsify(model.bert, "topk", keys=2)
    check_it_comes_back(model, inputs, tmp_path / "outer")
    check_it_comes_back(model.bert, inputs, tmp_path / "inner")
    model, inputs = make("CLIP")
    sparsify(model.vision_model, "latte", threshold=0.5)
    check_it_comes_back(model, inputs, tmp_path / "vision")
    sparsify(model.text_model, "topk", keys=2)
    loaded = check_it_comes_back(model, inputs, tmp_path / "both")
    check_it_comes_back(loaded, inputs, tmp_path / "again")


@pytest.mark.parametrize(
    "settings",
    [{"saving": {"max_shard_size": "20KB"}}, {"device_map": "cpu"}, {"dtype": torch.float32}, {"revision": "main"}],
    ids=str,
)
def test_shards_devices_and_types(settings: dict[str, Any], tmp_path: Path) -> None:
    model, inputs = make("Llama")
    sparsify(model, "latte", threshold=0.5)
    train(model)
    loaded = check_it_comes_back(model, inputs, tmp_path, **settings)
    copies = copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))
    for copied in copies:
        assert torch.equal(outputs(copied, inputs)[0], outputs(model, inputs)[0])


def test_files_hold_all_hyper_parameters(tmp_path: Path) -> None:
    model = build("BERT")
    (name, _) = sparsify(model, "latte", threshold=0.5)
    recipe = model.config.thresher[name]
    assert recipe["host"] == "huggingface"
    assert recipe["hyperparameters"] == hyperparameters(Latte) | {"threshold": 0.5}
    assert recipe["pattern"] == "NONCAUSAL_SELF"


def test_a_mechanism_that_is_not_threshers_is_refused_by_name(tmp_path: Path) -> None:
    model = build("BERT")
    sparsify(model, "latte", where=r"layer\.0")
    (name,) = inject(model, Spy, where=r"layer\.1")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"cannot be mounted again.*inject.*: {name} \(.*'{Spy.__module__}\.Spy'"):
        from_pretrained(str(tmp_path))


def test_a_mechanism_that_no_recipe_knows_is_refused_by_name(tmp_path: Path) -> None:
    """`mount` is not told of the model."""
    model, inputs = make("timm ViT")
    block = model.timm_model.blocks[0]
    block.attn = mount(block.attn, partial(Latte, threshold=0.5))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="saved without mechanisms"):
        from_pretrained(str(tmp_path))
    sparsify(model, "topk", keys=2, where=r"blocks\.1", example_inputs=inputs)
    model.save_pretrained(tmp_path / "both")
    with pytest.raises(
        ValueError, match=r"cannot be mounted again.*blocks\.0\.attn \(there is no .*latte\.mechanism\.Latte'"
    ):
        from_pretrained(str(tmp_path / "both"))
    model, _ = make("BERT")
    names = sparsify(model, "latte")
    del model.config.thresher[names[0]]
    model.save_pretrained(tmp_path / "part")
    with pytest.raises(ValueError, match=rf"does not describe: {names[0]}\.mechanism"):
        from_pretrained(str(tmp_path / "part"))


def test_a_place_that_is_gone_is_refused_by_name(tmp_path: Path) -> None:
    model = build("BERT")
    sparsify(model, "topk", keys=2)
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.thresher["bert.encoder.layer.7"] = next(iter(config.thresher.values()))
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no bert\.encoder\.layer\.7"):
        from_pretrained(str(tmp_path))


def test_a_layer_that_is_used_again_and_again_comes_back(tmp_path: Path) -> None:
    config = transformers.AlbertConfig(**SIZE | {"num_hidden_layers": 3, "embedding_size": 16, "vocab_size": 64})
    model = transformers.AlbertModel(config).eval()
    sparsify(model, "latte", threshold=0.5)
    check_it_comes_back(model, {"input_ids": TOKENS}, tmp_path)


def test_a_dense_load_is_sparsified_anew(tmp_path: Path) -> None:
    model = build("BERT")
    sparsify(model, "latte", where=r"layer\.1")
    model.save_pretrained(tmp_path)
    dense = type(model).from_pretrained(tmp_path)
    assert not mounted(dense)
    (name,) = sparsify(dense, "topk", keys=2, where=r"layer\.0")
    assert list(dense.config.thresher) == [name]
    assert call_model(dense, {"input_ids": TOKENS})[0].shape == (2, 7, 64)
