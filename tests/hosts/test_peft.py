"""PEFT's adapters and mechanisms in one model: thresholds learn and are saved, or somebody says that they do not."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from thresher import ComputeMeter, calibrate, densify, sparsify
from thresher.attention import Mechanism
from thresher.hosts import mounted
from thresher.hosts.__main__ import MODELS, build
from thresher.hosts.huggingface.host import from_pretrained
from thresher.hosts.recording import call_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
TARGETS = {"BERT": ["query"], "Llama": ["q_proj"], "timm ViT": ["qkv"], "timm EVA": ["proj"]}
TARGETS |= {"nn.TransformerEncoder": ["linear1"]}


def inputs_of(name: str) -> dict[str, Any]:
    return {"example_inputs": MODELS[name].inputs} if MODELS[name].recorded else {}


def sparse(name: str) -> nn.Module:
    model = build(name)
    sparsify(model, "latte", threshold=0.5, **inputs_of(name))
    return model


def output(name: str, model: nn.Module) -> Tensor:
    out = call_model(model, MODELS[name].inputs)
    return out if isinstance(out, Tensor) else out[0]


def adapted(model: nn.Module, name: str, **settings: Any) -> nn.Module:
    torch.manual_seed(1)
    config = LoraConfig(target_modules=TARGETS[name], init_lora_weights=False, **settings)
    return get_peft_model(model, config)


def thresholds(model: nn.Module, part: str) -> dict[str, Tensor]:
    return {name: x for name, x in model.named_parameters() if "offset" in name and part in name}


@pytest.mark.parametrize("name", TARGETS)
def test_thresholds_train_beside_an_adapter_and_are_saved_with_it(name: str, tmp_path: Path) -> None:
    model = adapted(sparse(name), name, modules_to_save=["mechanism"])
    assert mounted(model) == {f"base_model.model.{place}": what for place, what in mounted(sparse(name)).items()}
    meter = ComputeMeter(model)
    with meter:
        out = output(name, model.train())
    assert len(meter.calls) == len(mounted(model))
    (out.square().mean() + meter.kept()).backward()
    trained = thresholds(model, "modules_to_save")
    assert len(trained) == len(mounted(model))
    assert all(x.grad is not None and x.grad.any() for x in trained.values())
    assert not any(x.requires_grad for x in thresholds(model, "original_module").values())
    with torch.no_grad():
        for x in trained.values():
            x += torch.linspace(0.1, 0.4, len(x))
    calibrate(model.eval(), [None], 0.5, lambda _: output(name, model))
    for base in (x for buffer, x in model.named_buffers() if buffer.endswith("base")):
        base += 0.01  # off the pair that it was calibrated by
    with torch.no_grad():
        wanted = output(name, model)
        assert not torch.allclose(wanted, output(name, sparse(name)), atol=1e-2)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(sparse(name), str(tmp_path)).eval()
        assert_close(output(name, loaded), wanted, atol=1e-5, rtol=1e-5)
        with loaded.disable_adapter():
            assert_close(output(name, loaded), output(name, sparse(name)), atol=1e-5, rtol=1e-5)
        merged = loaded.merge_and_unload()
        assert_close(output(name, merged), wanted, atol=1e-4, rtol=1e-4)
    assert mounted(merged) == mounted(sparse(name))


@pytest.mark.parametrize("name", ["BERT", "timm ViT"])
def test_adapters_have_thresholds_of_their_own(name: str) -> None:
    model = adapted(sparse(name), name, modules_to_save=["mechanism"])
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    with torch.no_grad():
        for x in thresholds(model, "second").values():
            x += 100
    kept = {}
    for adapter in ("second", "default"):
        model.set_adapter(adapter)
        meter = ComputeMeter(model)
        with torch.no_grad(), meter:
            output(name, model)
        kept[adapter] = float(meter.kept())
    assert kept["second"] == 1.0
    assert kept["default"] < 0.9


def test_a_merged_model_is_saved_with_its_thresholds(tmp_path: Path) -> None:
    model = adapted(sparse("BERT"), "BERT", modules_to_save=["mechanism"])
    with torch.no_grad():
        for x in thresholds(model, "modules_to_save").values():
            x += 0.3
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(tmp_path)
    loaded = from_pretrained(str(tmp_path))
    assert mounted(loaded) == mounted(merged)
    assert_close(output("BERT", loaded), output("BERT", merged))
    densify(merged)
    assert not any(isinstance(module, Mechanism) for module in merged.modules())


@pytest.mark.parametrize("name", TARGETS)
def test_frozen_thresholds_are_told(name: str) -> None:
    model = adapted(sparse(name), name)
    with pytest.warns(UserWarning, match=r"Latte are frozen.*modules_to_save=\['mechanism'\]"):
        output(name, model.train())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output(name, model.eval())
        with torch.no_grad():
            output(name, model.train())


def test_thresholds_that_are_not_to_be_trained_are_nobodys_concern() -> None:
    model = build("BERT")
    sparsify(model, "latte", tail="none", trainable=False)
    model = adapted(model, "BERT").train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output("BERT", model)


@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_that_would_leave_a_mechanism_out_is_told_before(name: str) -> None:
    model = adapted(build(name), name)
    before = output(name, model.eval())
    for attention in ("latte", "smyrf"):
        with pytest.raises(ValueError, match=r"adapters of PEFT.*sparsify\(\) first, then .*modules_to_save"):
            sparsify(model, attention, **inputs_of(name))
    assert not mounted(model)
    assert torch.equal(output(name, model), before)
    sparsify(model, "topk", keys=2, tail="none", **inputs_of(name))  # keeps nothing that a file could miss
    assert not torch.equal(output(name, model), before)
    densify(model)
    assert torch.equal(output(name, model), before)


def test_feed_forward_layers_under_an_adapter_are_told() -> None:
    model = build("BERT")
    sparsify(model, "topk_ffn", keys=0.5)
    model = get_peft_model(model, LoraConfig(target_modules=["intermediate.dense"]))
    with pytest.raises(ValueError, match=r"dense became a Linear after the mechanism was mounted.*target_modules"):
        output("BERT", model)
    model = get_peft_model(build("BERT"), LoraConfig(target_modules=["intermediate.dense"]))
    with pytest.raises(TypeError, match=r"needs an nn\.Linear there"):
        sparsify(model, "topk_ffn", keys=0.5)
