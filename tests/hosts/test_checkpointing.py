"""Models whose libraries checkpoint their blocks train as they do without, and tell a budget when they cannot."""

from collections.abc import Callable, Iterator

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.hosts.models import SIZE, images
from tests.hosts.models import build as build_timm
from thresher import ComputeMeter, sparsify
from thresher.budget.budgets import Target
from thresher.hosts.__main__ import TOKENS
from thresher.hosts.__main__ import build as build_hub

# The name of both versions of transformers that are supported; the newer one has another, too.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
MECHANISMS: dict[str, dict[str, object]] = {
    "latte": {"threshold": 0.5, "gate": {"surrogate": "inside"}},
    "smyrf": {"cluster": 4},
    "yoso": {},
    "topk": {"keys": 3},
}
Run = Callable[[], Tensor]


@pytest.fixture(autouse=True)
def timm_setting() -> Iterator[None]:
    yield
    timm.layers.set_reentrant_ckpt(False)


def vit(attention: str, use_reentrant: bool | None) -> tuple[nn.Module, Run]:
    model = build_timm(depth=SIZE["depth"] - 1).train()
    sparsify(model, attention, **MECHANISMS[attention])
    model.set_grad_checkpointing(use_reentrant is not None)
    timm.layers.set_reentrant_ckpt(bool(use_reentrant))
    return model, lambda: model(images().float()).square().sum()


def llama(attention: str, use_reentrant: bool | None) -> tuple[nn.Module, Run]:
    torch.manual_seed(0)
    model = build_hub("Llama").train()
    sparsify(model, attention, **MECHANISMS[attention])
    model.enable_input_require_grads()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model, lambda: model(TOKENS, use_cache=False).logits.square().sum()


def trained(model: nn.Module, run: Run, weight: float) -> dict[str, Tensor]:
    """Return the gradients of a training step whose budget has a weight."""
    meter = ComputeMeter(model)
    torch.manual_seed(1)
    with meter:
        loss = run()
    if weight:
        loss = loss + Target(0.1, weight=weight, start=0.0, end=0.1).loss(meter.kept(), 0.5)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [vit, llama])
@pytest.mark.parametrize("attention", MECHANISMS)
def test_gradients_are_those_without(make: Callable[..., tuple[nn.Module, Run]], attention: str) -> None:
    for use_reentrant in (False, True):
        weight = 100.0 if attention == "latte" and not use_reentrant else 0.0
        wanted, found = (trained(*make(attention, kind), weight) for kind in (None, use_reentrant))
        assert wanted.keys() == found.keys()
        assert any("thresholds" in name for name in found) == (attention == "latte")
        for name, gradient in wanted.items():
            assert_close(found[name], gradient, msg=f"{name}, use_reentrant={use_reentrant}")


@pytest.mark.parametrize("make", [vit, llama])
def test_a_budget_that_gets_no_gradient_says_what_to_set(make: Callable[..., tuple[nn.Module, Run]]) -> None:
    with pytest.raises(ValueError, match="set use_reentrant=False"):
        trained(*make("latte", True), 100.0)
