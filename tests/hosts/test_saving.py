"""Adapters: mechanisms and their parameters, saved without the weights of their model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from thresher import densify, load_adapter, push_adapter, save_adapter, sparsify
from thresher.attention.shared.thresholds import named_thresholds
from thresher.hosts import mounted
from thresher.hosts.saving import CARD, DESCRIPTION, PARAMETERS

TOKENS = torch.arange(2 * 12).view(2, 12) % 30
SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


class Bare(nn.Module):
    """A block of one's own that calls scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (2, 8)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def build(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    models: dict[str, Any] = {
        "timm": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2),
        "BERT": lambda: BertModel(BertConfig(**SIZES)),
        "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)),
        "multihead": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2),
        "sdpa": lambda: nn.Sequential(Bare(), Bare()),
    }
    return models[kind]().eval()


def draw_inputs(kind: str) -> Tensor:
    if kind == "timm":
        return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return TOKENS if kind in ("BERT", "Llama") else torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, kind: str) -> Tensor:
    with torch.no_grad():
        out = model(draw_inputs(kind))
    return out if isinstance(out, Tensor) else out[0]


def build_sparse(kind: str, **changes: Any) -> nn.Module:
    """Build a model whose heads have thresholds and factors of their own."""
    model = build(kind)
    example = draw_inputs(kind) if kind == "sdpa" else None
    sparsify(model, **{"attention": "latte", "tail": "mean", "example_inputs": example} | changes)
    for index, (_, thresholds) in enumerate(named_thresholds(model)):
        thresholds.set_base(0.3 + 0.1 * index)
        thresholds.offset.data.add_(torch.arange(2) * 0.1)
    return model


@pytest.mark.parametrize("kind", ["timm", "BERT", "Llama", "multihead", "sdpa"])
def test_a_dense_model_with_an_adapter_is_the_model_that_was_saved(kind: str, tmp_path: Path) -> None:
    model = build_sparse(kind)
    save_adapter(model, tmp_path / "adapter")
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir()) < 20_000
    loaded = build(kind)
    assert not torch.equal(run(loaded, kind), run(model, kind))
    assert load_adapter(loaded, tmp_path / "adapter") == list(mounted(loaded))
    assert torch.equal(run(loaded, kind), run(model, kind))
    assert mounted(loaded) == mounted(model)
    densify(loaded)
    assert torch.equal(run(loaded, kind), run(build(kind), kind))


@pytest.mark.parametrize("kind", ["timm", "BERT"])
def test_thresholds_come_back_in_the_unit_that_they_took(kind: str, tmp_path: Path) -> None:
    model = build_sparse(kind, estimate={"bits": 8})
    in_spreads = run(model, kind)
    for _, thresholds in named_thresholds(model):
        thresholds.set_unit("nats", 0.35)
    assert not torch.equal(run(model, kind), in_spreads)
    save_adapter(model, tmp_path / "adapter")
    recipes = json.loads((tmp_path / "adapter" / DESCRIPTION).read_text())["mechanisms"].values()
    assert {(r["hyperparameters"]["unit"], r["hyperparameters"]["gate"]["tau"]) for r in recipes} == {("nats", 0.35)}
    loaded = build(kind)
    load_adapter(loaded, tmp_path / "adapter")
    assert {each.unit for _, each in named_thresholds(loaded)} == {"nats"}
    assert torch.equal(run(loaded, kind), run(model, kind))
    for recipe in recipes:
        recipe["hyperparameters"]["unit"] = "spread"
    description = json.loads((tmp_path / "adapter" / DESCRIPTION).read_text()) | {"mechanisms": {}}
    for name, recipe in zip(mounted(model), recipes, strict=True):
        description["mechanisms"][name] = recipe
    (tmp_path / "adapter" / DESCRIPTION).write_text(json.dumps(description))
    stale = build(kind)
    load_adapter(stale, tmp_path / "adapter")
    assert torch.equal(run(stale, kind), run(model, kind)), "the state decides"


def test_feed_forward_layers_go_with_it(tmp_path: Path) -> None:
    model = build_sparse("timm")
    sparsify(model, "topk_ffn", keys=5)
    save_adapter(model, tmp_path)
    loaded = build("timm")
    load_adapter(loaded, tmp_path)
    assert torch.equal(run(loaded, "timm"), run(model, "timm"))


def test_the_base_may_be_in_bf16(tmp_path: Path) -> None:
    save_adapter(build_sparse("Llama"), tmp_path)
    loaded = build("Llama").bfloat16()
    load_adapter(loaded, tmp_path)
    assert {p.dtype for _, t in named_thresholds(loaded) for p in t.parameters()} == {torch.float32}
    assert run(loaded, "Llama").isfinite().all()


def test_other_weights_are_refused_unless_they_are_wanted(tmp_path: Path) -> None:
    save_adapter(build_sparse("BERT"), tmp_path)
    other = build("BERT", seed=1)
    before = run(other, "BERT")
    with pytest.raises(ValueError, match=r"belongs to a .*BertModel with other weights.*same_weights=False"):
        load_adapter(other, tmp_path)
    assert torch.equal(run(other, "BERT"), before)
    assert load_adapter(other, tmp_path, same_weights=False)
    with pytest.raises(ValueError, match=r"BertModel, whose weights have other names.* this transformers.*LlamaFor"):
        load_adapter(build("Llama"), tmp_path, same_weights=False)


def test_what_comes_after_the_last_mechanism_may_be_another(tmp_path: Path) -> None:
    save_adapter(build_sparse("BERT"), tmp_path / "BERT")
    headless = BertModel(BertConfig(**SIZES), add_pooling_layer=False).eval()
    state = build("BERT").state_dict()
    headless.load_state_dict({name: state[name] for name in headless.state_dict()})
    load_adapter(headless, tmp_path / "BERT")
    assert torch.equal(run(headless, "BERT"), run(build_sparse("BERT"), "BERT"))
    save_adapter(build_sparse("timm"), tmp_path / "timm")
    retrained = build("timm")
    retrained.reset_classifier(7)
    assert load_adapter(retrained, tmp_path / "timm")
    for changed in ("blocks.1.mlp.fc2.bias", "pos_embed"):  # the last block counts whole, and what is before it
        other = build("timm")
        other.get_parameter(changed).data += 1
        with pytest.raises(ValueError, match="with other weights"):
            load_adapter(other, tmp_path / "timm")


def test_a_model_with_mechanisms_is_refused(tmp_path: Path) -> None:
    model = build_sparse("BERT")
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"already holds mechanisms, in encoder\.layer\.0.*call densify\(\) before"):
        load_adapter(model, tmp_path)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"BertModel holds no mechanism to save; sparsify\(\) gives it one"):
        save_adapter(build("BERT"), tmp_path)
    assert not any(tmp_path.iterdir())


def damage(folder: Path, how: str) -> None:
    description = json.loads((folder / DESCRIPTION).read_text())
    if how == "truncated":
        whole = (folder / PARAMETERS).read_bytes()
        (folder / PARAMETERS).write_bytes(whole[: len(whole) // 2])
    elif how == "no parameters":
        (folder / PARAMETERS).unlink()
    elif how == "not json":
        (folder / DESCRIPTION).write_text("{")
    elif how == "another format":
        (folder / DESCRIPTION).write_text(json.dumps(description | {"format": 99}))
    elif how == "no mechanisms":
        (folder / DESCRIPTION).write_text(json.dumps(description | {"mechanisms": {}}))
    elif how == "no fingerprint":
        description["base"].pop("weights")
        (folder / DESCRIPTION).write_text(json.dumps(description))
    elif how == "a layer less":
        description["mechanisms"].pop(next(iter(description["mechanisms"])))
        (folder / DESCRIPTION).write_text(json.dumps(description))
    elif how == "no tail":
        for recipe in description["mechanisms"].values():
            recipe["hyperparameters"]["tail"] = "none"
        (folder / DESCRIPTION).write_text(json.dumps(description))
    elif how == "names code":
        for recipe in description["mechanisms"].values():
            recipe["attention"] = "os.system"
        (folder / DESCRIPTION).write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"thresher\.safetensors is missing or damaged"),
        ("no parameters", r"thresher\.safetensors is missing or damaged"),
        ("not json", r"thresher\.json is damaged"),
        ("another format", r"has format 99, and this version of Thresher reads 1"),
        ("no mechanisms", r"is damaged: it lacks a base model or mechanisms"),
        ("no fingerprint", r"is damaged: it lacks a base model or mechanisms"),
        ("a layer less", r"has values that no mechanism takes: .*thresholds"),
        ("no tail", r"has values that no mechanism takes: .*tail\.factor"),
        ("names code", r"cannot be mounted again.*no attention mechanism|cannot be mounted again.*os\.system"),
    ],
)
def test_a_damaged_adapter_leaves_the_model_as_it_was(how: str, message: str, tmp_path: Path) -> None:
    save_adapter(build_sparse("BERT"), tmp_path)
    damage(tmp_path, how)
    model = build("BERT")
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert not mounted(model)
    assert torch.equal(run(model, "BERT"), run(build("BERT"), "BERT"))


def test_a_parameter_without_a_value_is_an_error(tmp_path: Path) -> None:
    save_adapter(build_sparse("BERT", tail="none"), tmp_path)
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    for recipe in description["mechanisms"].values():
        recipe["hyperparameters"]["tail"] = "mean"
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    model = build("BERT")
    with pytest.raises(ValueError, match=r"has no value for encoder\.layer\.0\.attention\.self\.tail\.factor"):
        load_adapter(model, tmp_path)
    assert not mounted(model)


def test_no_adapter_at_that_place_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no adapter: thresher\.json.*is not in it"):
        load_adapter(build("BERT"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter"):
        load_adapter(build("BERT"), tmp_path / "nowhere" / "at all")


def test_a_readme_of_your_own_stays(tmp_path: Path) -> None:
    model = build_sparse("BERT")
    save_adapter(model, tmp_path)
    first = (tmp_path / CARD).read_text()
    assert "latte, in 2 modules" in first
    save_adapter(model, tmp_path)
    assert (tmp_path / CARD).read_text() == first
    (tmp_path / CARD).write_text("mine")
    save_adapter(model, tmp_path)
    assert (tmp_path / CARD).read_text() == "mine"


def test_the_hub_holds_the_three_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder stands for the hub."""
    import huggingface_hub

    hub = tmp_path / "hub"

    class Api:
        def __init__(self, token: str | None = None) -> None:
            assert token == "secret"

        def create_repo(self, name: str, exist_ok: bool) -> None:
            assert exist_ok
            (hub / name).mkdir(parents=True)

        def upload_folder(self, repo_id: str, folder_path: str, allow_patterns: list[str]) -> str:
            for name in allow_patterns:
                shutil.copy(Path(folder_path) / name, hub / repo_id)
            return f"https://huggingface.co/{repo_id}"

    def download(name: str, allow_patterns: list[str]) -> str:
        if not (hub / name).is_dir():
            raise OSError("404")
        return str(hub / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = build_sparse("BERT")
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "diary.txt").touch()
    assert (
        push_adapter(tmp_path / "adapter", "me/sparse-bert", token="secret") == "https://huggingface.co/me/sparse-bert"
    )
    assert {file.name for file in (hub / "me" / "sparse-bert").iterdir()} == {CARD, DESCRIPTION, PARAMETERS}
    loaded = build("BERT")
    load_adapter(loaded, "me/sparse-bert")
    assert torch.equal(run(loaded, "BERT"), run(model, "BERT"))
    with pytest.raises(FileNotFoundError, match=r"no folder me/other, and no such repository on the hub: 404"):
        load_adapter(build("BERT"), "me/other")
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        push_adapter(tmp_path / "nothing", "me/other")
