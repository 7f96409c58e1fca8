"""Mechanisms inside timm's vision transformers: nothing changes but the attention, and it comes out again."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.testing import assert_close

from tests.attention.configured import configured
from tests.hosts.models import BLOCKS, MODELS, build, images, loss_of, same_state, tokens
from thresher import densify, inject, mount, sparsify
from thresher.attention import Mechanism
from thresher.attention.dense import Dense
from thresher.attention.latte.mechanism import Latte
from thresher.hosts.core import Host
from thresher.testing.inputs import first, noise_like


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_dense_inside_a_vision_transformer_changes_no_bit(name: str, training: bool) -> None:
    plain, hosted = build(name), build(name)
    assert sparsify(hosted, "dense") == BLOCKS
    assert all(isinstance(hosted.get_submodule(block), Host) for block in BLOCKS)
    assert same_state(hosted, plain)
    assert [n for n, _ in hosted.named_parameters()] == [n for n, _ in plain.named_parameters()]
    losses = [loss_of(model.train(training)) for model in (plain, hosted)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (parameter_name, old), new in zip(plain.named_parameters(), hosted.parameters(), strict=True):
        assert torch.equal(old.grad, new.grad), parameter_name


@pytest.mark.parametrize(
    "settings",
    [
        {"gated": True, "qkv_bias": True},
        {"attn_head_dim": 5, "num_heads": 3},
        {"dim_out": 12},
        {"gated": True, "qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm},
    ],
    ids=str,
)
def test_every_option_of_the_attention_module_is_carried_over(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    plain = Attention(**({"dim": 32, "num_heads": 2} | settings))  # type: ignore[arg-type]
    hosted = mount(copy.deepcopy(plain), Dense)
    assert torch.equal(hosted(tokens()), plain(tokens()))
    assert list(hosted.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_sparse_attention_adds_state_and_renames_none(name: str) -> None:
    plain, hosted = build(name), build(name)
    sparsify(hosted, "latte", threshold=0.5)
    added = hosted.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() <= hosted.state_dict().keys()
    parts = (*(f"thresholds.{part}" for part in ("base", "eval_base", "tau", "in_spreads", "offset")), "tail.factor")
    assert added == {f"{block}.mechanism.{part}" for block in BLOCKS for part in parts}
    assert not torch.allclose(hosted(images()), plain(images()))


class Doubled(Attention):
    """A user's attention, which does something of its own."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return 2 * super().forward(x)


class Renamed(Attention):
    """A user's attention that is timm's by another name."""


def test_a_subclass_with_arithmetic_of_its_own_is_not_replaced_unnoticed() -> None:
    plain = Doubled(32, 2)
    try:
        hosted = mount(copy.deepcopy(plain), Dense)
    except TypeError:
        return
    assert torch.equal(hosted(tokens()), plain(tokens()))


def test_a_subclass_with_the_same_arithmetic_is_mounted() -> None:
    plain = Renamed(32, 2)
    assert torch.equal(mount(copy.deepcopy(plain), Dense)(tokens()), plain(tokens()))


class SharedAttention(nn.Module):
    """Two layers that use one attention module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Attention(32, 2)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


def test_a_module_that_is_used_twice_is_replaced_in_both_places_and_stays_shared() -> None:
    model = SharedAttention()
    wanted = model(tokens())
    sparsify(model, "dense")
    assert isinstance(model.second, Host)
    assert model.first is model.second
    assert torch.equal(model(tokens()), wanted)
    densify(model)
    assert isinstance(model.second, Attention)
    assert model.first is model.second


@pytest.mark.parametrize("attention", ["dense", "latte"])
@pytest.mark.parametrize("name", MODELS)
def test_densify_gives_back_the_model_that_was(name: str, attention: str) -> None:
    plain, model = build(name), build(name)
    sparsify(model, attention)
    assert densify(model) == BLOCKS
    assert all(type(model.get_submodule(block)) is Attention for block in BLOCKS)
    assert same_state(model, plain)
    assert torch.equal(loss_of(model), loss_of(plain))


def test_densify_keeps_what_was_trained() -> None:
    model, plain = build(), build()
    sparsify(model, "latte", threshold=1.0)
    optimiser = torch.optim.SGD(model.train().parameters(), lr=0.01)
    loss_of(model).backward()
    optimiser.step()
    densify(model)
    assert not same_state(model, plain)
    assert not any(isinstance(m, Mechanism) for m in model.modules())
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(loss_of(model.eval()), loss_of(plain))


@pytest.mark.parametrize("training", [True, False])
def test_mounting_and_densifying_keep_the_mode(training: bool) -> None:
    model = build(attn_drop_rate=0.5).train(training)
    sparsify(model, "latte")
    assert all(m.training == training for m in model.modules())
    model.train(not training)
    densify(model)
    assert all(m.training != training for m in model.modules())


def test_densify_keeps_layers_that_were_exchanged_meanwhile() -> None:
    """As adapters do, which wrap a projection in a module of their own."""
    model = build()
    sparsify(model, "dense")
    exchanged = nn.Linear(32, 96)
    model.get_submodule("blocks.1.attn").qkv = exchanged
    wanted = loss_of(model)
    densify(model)
    assert model.get_submodule("blocks.1.attn").qkv is exchanged
    assert torch.equal(loss_of(model), wanted)


def test_a_copy_is_a_model_of_its_own_and_can_be_densified() -> None:
    model, plain = build(), build()
    sparsify(model, "dense")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter += 0.1
    assert same_state(model, plain)
    assert torch.equal(loss_of(model), loss_of(plain))
    wanted = loss_of(copied)
    densify(copied)
    assert torch.equal(loss_of(copied), wanted)
    assert all(type(copied.get_submodule(block)) is Attention for block in BLOCKS)
    densify(model)
    assert torch.equal(loss_of(model), loss_of(plain))
    assert same_state(model, plain)


def test_a_dense_model_has_nothing_to_take_out() -> None:
    with pytest.raises(ValueError, match="holds no mechanism"):
        densify(build())


MASKS = {
    "boolean": noise_like(torch.empty(6, 6)) > -0.5,
    "boolean, by example": (noise_like(torch.empty(2, 1, 6, 6)) > -0.5) | torch.eye(6).bool(),
    "boolean, keys": first([6, 4], 6)[:, None, None, :],
    "boolean, by head": (noise_like(torch.empty(1, 2, 6, 6)) > -0.5) | torch.eye(6).bool(),
    "additive": noise_like(torch.empty(6, 6)),
    "additive, by head": noise_like(torch.empty(2, 2, 6, 6), 3.0),
    "additive, causal": torch.full((6, 6), -torch.inf).triu(1),
    "additive, keys": torch.zeros(2, 1, 1, 6).masked_fill(~first([6, 4], 6)[:, None, None, :], -torch.inf),
    "additive, partly infinite": noise_like(torch.empty(6, 6)).masked_fill(
        ~torch.ones(6, 6).bool().tril(2), -torch.inf
    ),
}


@pytest.mark.parametrize(
    "attention", [Dense, partial(Latte, threshold=torch.inf, estimate={"bits": "exact"})], ids=["dense", "latte"]
)
@pytest.mark.parametrize("mask", MASKS)
def test_an_attention_mask_means_what_it_means_to_timm(mask: str, attention: Callable[..., Mechanism]) -> None:
    torch.manual_seed(0)
    plain = Attention(32, 2).double()
    hosted = mount(copy.deepcopy(plain), attention)
    attn_mask = MASKS[mask] if MASKS[mask].dtype == torch.bool else MASKS[mask].double()
    wanted, got = plain(tokens().double(), attn_mask=attn_mask), hosted(tokens().double(), attn_mask=attn_mask)
    assert_close(got, wanted, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(got, hosted(tokens().double()))


def test_a_whole_model_takes_a_mask() -> None:
    model, plain = build(), build()
    sparsify(model, "dense")
    mask = first([17, 9], 17)[:, None, None, :]
    assert_close(model.forward_features(images(), attn_mask=mask), plain.forward_features(images(), attn_mask=mask))


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("name", configured())
def test_padding_that_a_mask_of_keys_hides_has_no_influence_on_other_tokens(name: str, additive: bool) -> None:
    """Such a mask leaves the rows of padding to compute nonsense; nobody else may be affected."""
    torch.manual_seed(0)
    hosted = mount(Attention(32, 2), configured()[name]).eval()
    x = tokens(n=12)
    junk = x.clone()
    junk[1, 7:] *= 100
    visible = first([12, 7], 12)[:, None, None, :]
    if additive:
        visible = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    before, after = hosted(3 * x, attn_mask=visible), hosted(3 * junk, attn_mask=visible)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1, :7], after[1, :7])


def test_a_causal_call_is_refused() -> None:
    hosted = mount(Attention(32, 2), Dense)
    with pytest.raises(ValueError, match="causal"):
        hosted(tokens(), is_causal=True)


def test_dropout_of_attention_weights_is_carried_over() -> None:
    plain, hosted = build(attn_drop_rate=0.3), build(attn_drop_rate=0.3)
    sparsify(hosted, "dense")
    assert all(hosted.get_submodule(block).mechanism.dropout == 0.3 for block in BLOCKS)
    outputs = []
    for model in (plain.train(), hosted.train()):
        torch.manual_seed(1)
        outputs.append(model(images()))
    assert torch.equal(*outputs)
    assert not torch.equal(hosted(images()), outputs[1])
    assert torch.equal(hosted.eval()(images()), plain.eval()(images()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", configured())
def test_every_configured_mechanism_trains_a_step(name: str, dtype: torch.dtype) -> None:
    model = build(global_pool="avg")
    assert inject(model, configured()[name]) == BLOCKS
    model.to(dtype).train()
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    draws = 16 if configured()[name].func.stochastic else 1  # type: ignore[attr-defined]

    def mean_loss() -> Tensor:
        torch.manual_seed(1)
        return torch.stack([model(images().to(dtype)).float().square().mean() for _ in range(draws)]).mean()

    loss = mean_loss()
    loss.backward()
    optimiser.step()
    assert loss.isfinite()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), parameter_name
    changed = [key for key, x in model.state_dict().items() if not torch.equal(x, before[key])]
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.2.attn.proj.weight"} <= set(changed)
    assert mean_loss() < loss


@pytest.mark.parametrize("name", MODELS)
def test_a_mechanism_that_samples_the_value_projection_learns_what_it_was(name: str) -> None:
    plain, hosted = build(name), build(name)
    sparsify(hosted, "mca", alpha=1e-6, grad="sampled")
    losses = [loss_of(model.train()) for model in (plain, hosted)]
    assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (parameter_name, old), new in zip(plain.named_parameters(), hosted.parameters(), strict=True):
        assert_close(new.grad, old.grad, atol=1e-3, rtol=1e-3, msg=lambda m, n=parameter_name: f"{n}: {m}")


@pytest.mark.parametrize("attention", ["topk", "smyrf", "yoso", "latte"])
def test_a_mask_of_keys_reaches_any_mechanism_whole(attention: str) -> None:
    """timm broadcasts masks of shape [b, 1, 1, n]; top-k cuts its queries into chunks."""
    model = build().double()
    sparsify(model, attention, **({"chunk": 2} if attention == "topk" else {}))
    module = model.get_submodule(BLOCKS[0])
    mask = first([6, 4], 6)
    x = tokens().double()
    wide = mask[:, None, None, :].expand(-1, -1, 6, -1)
    out = module(x, attn_mask=mask[:, None, None, :])
    assert torch.equal(out, module(x, attn_mask=wide))
    additive = torch.zeros(2, 1, 1, 6).double().masked_fill(~mask[:, None, None, :], float("-inf"))
    assert_close(module(x, attn_mask=additive), out)


def test_smyrf_with_one_cluster_drops_in_for_a_trained_network() -> None:
    model = build()
    before = model(images())
    sparsify(model, "smyrf", cluster=1000)
    assert_close(model(images()), before)
