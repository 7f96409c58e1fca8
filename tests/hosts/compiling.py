"""Compile small models of every host and compare them with themselves; what operators announce is compared, too.

`python -m tests.hosts.compiling strides few`, or `inductor some`, or `all` (many minutes): in a process of its own,
since the shape checks that tests weave in cannot be traced.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten

from thresher import sparsify
from thresher.hosts.__main__ import build as build_hub
from thresher.testing.inputs import noise_like

Given = dict[str, Tensor]
MECHANISMS: dict[str, dict[str, object]] = {
    "latte": {"threshold": 0.5, "gate": {"surrogate": "inside"}},
    "topk": {"keys": 3},
    "smyrf": {"cluster": 4, "resample": "never"},
    "yoso": {"hash": {"resample": "never"}},
}


class Checked(Interpreter):
    """Runs a graph, and asserts that each of our operators returns what it announced."""

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if "thresher" in str(n.target):
            for one, announced in zip(tree_flatten(result)[0], tree_flatten(n.meta["val"])[0], strict=True):
                sizes = [*announced.shape, *announced.stride()]
                if all(isinstance(size, int) for size in sizes):
                    assert [*one.shape, *one.stride()] == sizes, f"{n.target} announces {sizes[one.ndim :]}"
        return result


def checked(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    return make_boxed_func(Checked(graph).run)


BACKENDS = {"strides": aot_autograd(fw_compiler=checked), "inductor": "inductor"}


class Encoder(nn.Module):
    """One layer of `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return x + out


class Calls(nn.Module):
    """One layer that calls `F.scaled_dot_product_attention`, with heads that share keys."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return x + out


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (4, 8)).transpose(1, 2).chunk(2, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


def vit() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=4)


def images(batch: int, length: int) -> Given:
    return {"x": noise_like(torch.empty(batch, 3, 16, 16, dtype=torch.float64))}


def features(batch: int, length: int) -> Given:
    return {"x": noise_like(torch.empty(batch, length, 32, dtype=torch.float64))}


def texts(batch: int, length: int) -> Given:
    ids = torch.arange(3, 3 + batch * length).remainder(60).view(batch, length)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < length - 2).expand(batch, length).long()}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Given]]] = {
    "ViT": (vit, images),
    "BERT": (lambda: build_hub("BERT"), texts),
    "Llama": (lambda: build_hub("Llama"), texts),  # two query heads share a key head
    "MultiheadAttention": (Encoder, features),
    "SDPA": (Calls, features),
}
FP32_INSIDE = {"Llama"}  # transformers takes sines and cosines of positions in fp32, and inductor takes others
Case = tuple[str, str, int, bool, str]
FEW: list[Case] = [
    ("ViT", "latte", 1, True, ""),
    ("Llama", "latte", 1, True, ""),
    ("MultiheadAttention", "latte", 1, False, ""),
    ("SDPA", "latte", 1, True, ""),
]
OTHERS: list[Case] = [
    *[(model, attention, 1, True, "") for model, attention in (("ViT", "topk"), ("Llama", "smyrf"), ("BERT", "yoso"))],
    ("MultiheadAttention", "topk", 1, False, ""),
]
SOME: list[Case] = [  # each model, mechanism and kind of shape once: generating code takes half a minute a case
    *[(model, "latte", 2, True, "") for model in MODELS],
    ("BERT", "latte", 2, True, "marked"),
    ("SDPA", "latte", 2, True, "always"),
    *OTHERS,
]
ALL: list[Case] = [
    *[(model, "latte", batch, training, "") for model in MODELS for batch in (1, 2) for training in (True, False)],
    *[(model, "latte", 2, True, how) for model, how in (("ViT", "marked"), ("BERT", "marked"))],
    *[(model, "latte", 2, True, "always") for model in ("SDPA", "Llama")],
    *OTHERS,
]


def prepared(name: str, attention: str, training: bool) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]().double()  # in which no rounding moves a pair across a threshold
    example = MODELS[name][1](2, 7) if name in ("MultiheadAttention", "SDPA") else None
    sparsify(model, attention, example_inputs=example, **MECHANISMS[attention])
    return model.train(training)


def results(model: nn.Module, run: Callable[..., Any], given: Given) -> dict[str, Tensor]:
    """Return the output, and in training the gradients."""
    model.zero_grad()
    with torch.set_grad_enabled(model.training):
        out = run(**given)
    out = out if isinstance(out, Tensor) else out[0]
    if model.training:
        out.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **grads}


def compare(backend: Any, name: str, attention: str, batch: int, training: bool, dynamic: str) -> None:
    """Compile for one number of examples; with dynamic shapes, run with another number and length as well."""
    torch._dynamo.reset()
    model = prepared(name, attention, training)
    compiled = torch.compile(model, backend=backend, dynamic=True if dynamic == "always" else None)
    for size, length in ((batch, 7), (batch + 1, 9)) if dynamic else ((batch, 7),):
        given = MODELS[name][1](size, length)
        if dynamic == "marked":
            for x in given.values():
                torch._dynamo.mark_dynamic(x, 0)
        wanted, found = (results(model, run, given) for run in (model, compiled))
        assert wanted.keys() == found.keys()
        for key, x in wanted.items():
            atol = 1e-5 * float(x.abs().max()) if name in FP32_INSIDE else 1e-9
            assert_close(found[key], x, atol=atol, rtol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


if __name__ == "__main__":
    backend, number = sys.argv[1:]
    for case in {"few": FEW, "some": SOME, "all": ALL}[number]:
        start = time.perf_counter()
        compare(BACKENDS[backend], *case)
        print(*case, f"{time.perf_counter() - start:.1f} s", flush=True)
