"""Mechanisms in any module that calls PyTorch's attention, and in PyTorch's own modules."""

import copy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from tests.hosts.models import same_state
from tests.hosts.spy import Spy
from thresher import densify, inject, sparsify
from thresher.attention import Mechanism, Pattern, available
from thresher.attention.dense import Dense
from thresher.attention.latte.mechanism import Latte
from thresher.hosts import mounted
from thresher.hosts.__main__ import MODELS, build, compute_output
from thresher.testing.inputs import noise_like

TIMM = ["timm EVA", "timm BEiT"]
X = noise_like(torch.empty(2, 7, 32))
MEMORY = noise_like(torch.empty(2, 9, 32), 2.0)
PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
CAUSAL = torch.ones(7, 7, dtype=torch.bool).triu(1)


class Own(nn.Module):
    """A user's attention: parameters and buffers of its own, and any argument that the function takes."""

    def __init__(self, key_heads: int = 4, dropout: float = 0.0, **arguments: Any) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(32, 32), nn.Linear(32, 16 * key_heads), nn.Linear(32, 32)
        self.gain = nn.Parameter(torch.linspace(0.5, 2, 32))
        self.register_buffer("shift", torch.linspace(-1, 1, 32))
        self.dropout, self.arguments = dropout, arguments

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = self.kv(memory).unflatten(-1, (2, -1, 8)).unbind(2)
        p = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(
            q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, dropout_p=p, **self.arguments
        )
        return self.out(out.transpose(1, 2).flatten(2) * self.gain + self.shift)


class Net(nn.Module):
    """Two layers of it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = Own(**settings), Own(**settings)
        self.eval()

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.two(x + self.one(x, memory, mask), memory, mask)


def own(**settings: Any) -> tuple[Net, Net]:
    return Net(**settings), Net(**settings)


@pytest.mark.parametrize("name", TIMM)
def test_dense_changes_no_image(name: str) -> None:
    plain, hosted = build(name), build(name)
    inputs = MODELS[name].inputs
    names = sparsify(hosted, "dense", example_inputs=inputs)
    assert names == ["blocks.0.attn", "blocks.1.attn"]
    assert all(kind.startswith("SdpaAttention: Dense") for kind in mounted(hosted).values())
    assert same_state(hosted, plain)
    assert [n for n, _ in hosted.named_parameters()] == [n for n, _ in plain.named_parameters()]
    losses = [compute_output(model.train(), inputs).square().sum() for model in (plain, hosted)]
    assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (parameter, old), new in zip(plain.named_parameters(), hosted.parameters(), strict=True):
        assert_close(new.grad, old.grad, msg=lambda m, n=parameter: f"{n}: {m}")


@pytest.mark.parametrize("name", ["pvt_v2_b0", "cait_xxs24_224", "vit_relpos_small_patch16_224"])
def test_other_families_are_found(name: str) -> None:
    torch.manual_seed(0)
    small = {} if "pvt" in name else {"img_size": 64, "depth": 2}
    plain = timm.create_model(name, num_classes=3, **small).eval()
    hosted = copy.deepcopy(plain)
    images = noise_like(torch.empty(1, 3, 64, 64))
    assert sparsify(hosted, "dense", example_inputs=images)
    assert_close(hosted(images), plain(images), atol=1e-5, rtol=1e-5)


def test_a_model_with_both_has_the_right_host_for_each() -> None:
    model = nn.Sequential(build("timm ViT").blocks, Own(), nn.TransformerEncoderLayer(32, 4, 40, batch_first=True))
    names = sparsify(model, "latte", example_inputs=X)
    kinds = [mounted(model)[name].partition(":")[0] for name in names]
    assert kinds == ["TimmAttention", "TimmAttention", "SdpaAttention", "MultiheadAttention"]


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({}, {}),
        ({"scale": 1.0}, {}),
        ({"is_causal": True}, {}),
        ({"key_heads": 2, "enable_gqa": True}, {}),
        ({}, {"memory": MEMORY}),
        ({}, {"mask": ~CAUSAL}),
        ({}, {"mask": ~PADDING[:, None, None]}),
        ({}, {"mask": noise_like(torch.empty(1, 4, 7, 7))}),
        ({}, {"mask": torch.zeros(7, 7).masked_fill(CAUSAL.T, -torch.inf)}),
    ],
    ids=["plain", "scale", "causal", "grouped", "cross", "causal mask", "keys", "bias", "additive"],
)
@pytest.mark.parametrize(
    "make", [Dense, partial(Latte, threshold=torch.inf, estimate={"bits": "exact"})], ids=["dense", "latte"]
)
def test_every_argument_of_the_function_is_respected(settings: Any, arguments: Any, make: Any) -> None:
    plain, hosted = own(**settings)
    plain, hosted = plain.double(), hosted.double()
    wide = {name: x if x.dtype == torch.bool else x.double() for name, x in ({"x": X} | arguments).items()}
    assert inject(hosted, make, example_inputs=wide) == ["one", "two"]
    assert_close(hosted(**wide), plain(**wide), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "arguments", "pattern"),
    [
        ({}, {}, Pattern.NONCAUSAL_SELF),
        ({"is_causal": True}, {}, Pattern.CAUSAL_SELF),
        ({}, {"mask": ~CAUSAL}, Pattern.CAUSAL_SELF),
        ({}, {"mask": torch.zeros(7, 7).masked_fill(CAUSAL, -torch.inf)}, Pattern.CAUSAL_SELF),
        ({}, {"memory": MEMORY}, Pattern.NONCAUSAL_CROSS),
    ],
)
def test_the_pattern_is_recorded(settings: Any, arguments: Any, pattern: Pattern) -> None:
    model = Net(**settings)
    sparsify(model, "latte", example_inputs={"x": X} | arguments)
    assert [m.pattern for m in model.modules() if isinstance(m, Mechanism)] == [pattern] * 2


def test_calls_that_differ_from_the_example_are_refused() -> None:
    model = Net()
    sparsify(model, "dense", example_inputs=X)
    with pytest.raises(ValueError, match="noncausal_self and is called with 7 queries and 9 keys"):
        model(X, MEMORY)
    model.one.arguments["is_causal"] = True
    with pytest.raises(ValueError, match="noncausal_self and is called as causal"):
        model(X)
    model = Net(is_causal=True)
    sparsify(model, "dense", example_inputs=X)
    model.one.arguments["is_causal"] = False
    with pytest.raises(ValueError, match="causal_self and is called without causality"):
        model(X)


def test_dropout_is_passed_on_or_refused() -> None:
    plain, hosted = own(dropout=0.3)
    sparsify(hosted, "dense", example_inputs=X)
    assert [m.dropout for m in hosted.modules() if isinstance(m, Mechanism)] == [0.3, 0.3]
    assert not hosted.one.original.training
    outputs = []
    for model in (plain.train(), hosted.train()):
        torch.manual_seed(1)
        outputs.append(model(X))
    assert torch.equal(*outputs)
    assert torch.equal(plain.eval()(X), hosted.eval()(X))
    model = Net(dropout=0.3)
    with pytest.raises(ValueError, match="attention dropout to 0"):
        sparsify(model, "yoso", example_inputs=X)
    assert not mounted(model)
    assert same_state(model, plain)


class Always(Own):
    """A user's mistake: dropout that evaluation does not switch off."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).transpose(1, 2).flatten(2)


def test_dropout_in_evaluation_is_refused() -> None:
    model = nn.Sequential(Always())
    sparsify(model, "dense", example_inputs=X)
    model.train()(X)
    with pytest.raises(ValueError, match="outside of training"):
        model.eval()(X)


def test_mca_is_refused_with_the_reason() -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"Mca needs to know what values are projected from.*Own does not say"):
        sparsify(model, "mca", example_inputs=X)
    assert not mounted(model)


class Flat(nn.Module):
    """Attention without an axis of heads."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def test_what_cannot_be_mounted_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"Flat is refused: mechanisms attend over \[batch, heads.*got 3 axes"):
        sparsify(nn.Sequential(Flat()), "dense", example_inputs=X)
    with pytest.raises(ValueError, match=r"Own is refused: it attends in its own forward"):
        sparsify(Own(), "dense", example_inputs=X)
    with pytest.raises(ValueError, match=r"no attention module.*with example_inputs"):
        sparsify(Net(), "dense")
    model = nn.Sequential(Own(), Flat())
    assert sparsify(model, "dense", example_inputs=X) == ["0"]


@pytest.mark.parametrize("attention", [name for name in available() if name != "mca"])  # which this host refuses
def test_the_content_of_padding_changes_no_real_token(attention: str) -> None:
    model = Net()
    sparsify(model, attention, example_inputs=X)
    junk = torch.where(PADDING[..., None], 100 * X, X)
    before, after = (model(x, mask=~PADDING[:, None, None])[~PADDING] for x in (X, junk))
    assert torch.equal(before, after)


def test_a_mask_of_keys_stays_of_linear_size() -> None:
    model = Net()
    inject(model, Spy, example_inputs=X)
    for mask in (~PADDING[:, None, None], (~PADDING[:, None, None]).expand(-1, 1, 7, -1)):
        Spy.calls.clear()
        model(X, mask=mask)
        for call in Spy.calls:
            assert call.pairs is None
            assert torch.equal(call.keys, ~PADDING)


@pytest.mark.parametrize("name", [*TIMM, "own"])
def test_densify_gives_back_the_model_that_was(name: str) -> None:
    plain, model = own() if name == "own" else (build(name), build(name))
    inputs = X if name == "own" else MODELS[name].inputs
    sparsify(model, "latte", example_inputs=inputs)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter += 0.1
    kinds = [type(m) for m in plain.modules()]
    densify(model)
    assert [type(m) for m in model.modules()] == kinds
    assert same_state(model, plain)
    assert torch.equal(model(inputs), plain(inputs))
    assert not same_state(copied, plain)
    densify(copied)
    plain.load_state_dict(copied.state_dict())
    assert torch.equal(copied(inputs), plain(inputs))


def test_the_wrapped_module_follows_in_mode_place_and_precision() -> None:
    plain, hosted = own(dropout=0.5)
    sparsify(hosted, "latte", example_inputs=X, threshold=torch.inf, estimate={"bits": "exact"})
    hosted.train()
    assert not torch.equal(hosted(X), hosted(X))
    hosted.eval().double()
    assert_close(hosted(X.double()), plain.double()(X.double()))
    hosted.load_state_dict(Net().double().state_dict(), strict=True)
    hosted.one.shift = hosted.one.shift + 1
    hosted.one.q = nn.Linear(32, 32).double()
    densify(hosted)
    assert hosted.one.shift[0] == 0
    assert hosted.one.arguments == {}


def compile_in_one_graph(attention: str) -> None:
    model = Net()
    sparsify(model, attention, example_inputs=X)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_close(compiled(X), model(X))
    compiled.train()(X).sum().backward()
    assert model.one.gain.grad is not None


def test_the_host_compiles_into_one_graph() -> None:
    """In a process of its own: shape checks, which cannot be traced, are woven into this one."""
    code = "from tests.hosts.test_sdpa import *; [compile_in_one_graph(name) for name in ('dense', 'latte')]"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=Path(__file__).parents[2])
