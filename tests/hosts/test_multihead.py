"""Mechanisms in PyTorch's own modules: `nn.MultiheadAttention` and the layers that hold it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.hosts.models import same_state
from tests.hosts.spy import Spy
from thresher import densify, inject, mount, sparsify
from thresher.attention import Mechanism, Pattern, available
from thresher.attention.dense import Dense
from thresher.hosts import mounted
from thresher.hosts.__main__ import MODELS, build
from thresher.hosts.core import Host
from thresher.testing.inputs import noise_like

X = noise_like(torch.empty(2, 7, 32))
MEMORY = noise_like(torch.empty(2, 9, 32), 2.0)
PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
CAUSAL = torch.ones(7, 7, dtype=torch.bool).triu(1)


def encoder(training: bool = False, **settings: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 40, 0.0, **({"batch_first": True} | settings))
    nested = layer.self_attn.batch_first and not layer.norm_first and layer.self_attn.in_proj_bias is not None
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).train(training)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("settings", [{}, {"norm_first": True}, {"bias": False}, {"batch_first": False}], ids=str)
def test_dense_in_a_transformer_encoder_changes_no_real_token(settings: Any, padded: bool, training: bool) -> None:
    plain, hosted = encoder(training, **settings), encoder(training, **settings)
    names = sparsify(hosted, "dense")
    assert names == ["layers.0.self_attn", "layers.1.self_attn"]
    assert same_state(hosted, plain)
    along = (lambda x: x) if settings.get("batch_first", True) else (lambda x: x.transpose(0, 1))
    padding = PADDING if padded else None
    shown = slice(None) if padding is None else ~padding
    with torch.no_grad():
        wanted, got = (along(m(along(X), src_key_padding_mask=padding))[shown] for m in (plain, hosted))
    assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [True, False])
def test_no_fast_path_passes_the_mechanism_by(padded: bool) -> None:
    plain, model = encoder(), encoder()
    inject(model, Spy)
    padding = PADDING if padded else None
    with torch.no_grad():
        for m, calls in ((model, 2), (model.layers[0], 1)):
            Spy.calls.clear()
            m(X, src_key_padding_mask=padding)
            assert len(Spy.calls) == calls
            assert all(call.pairs is None for call in Spy.calls)
        densify(model)
        assert model.use_nested_tensor == plain.use_nested_tensor
        assert torch.equal(model(X, src_key_padding_mask=padding), plain(X, src_key_padding_mask=padding))
        Spy.calls.clear()
        model(X)
        assert not Spy.calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attention", available())
def test_the_content_of_padding_changes_no_real_token_of_an_encoder(attention: str, training: bool) -> None:
    model = encoder(training)
    sparsify(model, attention)
    junk = torch.where(PADDING[..., None], 100 * X, X)
    outputs = []
    for x in (X, junk):
        torch.manual_seed(1)
        outputs.append(model(x, src_key_padding_mask=PADDING)[~PADDING])
    assert torch.equal(*outputs)


def test_a_decoder_is_causal_where_it_was_in_the_example() -> None:
    name = "nn.TransformerDecoder"
    plain, hosted = build(name), build(name)
    sparsify(hosted, "dense", example_inputs=MODELS[name].inputs)
    patterns = [m.pattern for m in hosted.modules() if isinstance(m, Mechanism)]
    assert patterns == [Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS] * 2
    wanted = plain(**MODELS[name].inputs)
    assert_close(hosted(**MODELS[name].inputs), wanted, atol=1e-5, rtol=1e-5)
    later = MODELS[name].inputs["tgt"].clone()
    later[:, 3:] += 1
    assert_close(hosted(**MODELS[name].inputs | {"tgt": later})[:, :3], wanted[:, :3], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="without a causal mask"):
        hosted(X[:, :5], MEMORY)


def test_a_refusal_half_way_leaves_the_model_as_it_was() -> None:
    name = "nn.TransformerDecoder"
    plain, model = build(name), build(name)
    with pytest.raises(ValueError, match=r"Mca.*causal"):
        sparsify(model, "mca", example_inputs=MODELS[name].inputs)
    with pytest.raises(ValueError, match="NoAttention does not support causal_cross"):
        sparsify(model, "none", example_inputs=MODELS[name].inputs)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]


def test_without_an_example_attention_is_noncausal_self_attention() -> None:
    model = build("nn.TransformerDecoder")
    sparsify(model, "dense")
    with pytest.raises(ValueError, match=r"as noncausal_self.*called as causal"):
        model(**MODELS["nn.TransformerDecoder"].inputs)
    with pytest.raises(ValueError, match=r"as noncausal_self.*example_inputs"):
        model(X, MEMORY)


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"batch_first": True}, {"kdim": 12, "vdim": 20}], ids=str)
@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "by head", "both"])
def test_every_option_of_multi_head_attention_is_carried_over(settings: dict[str, Any], mask: str) -> None:
    torch.manual_seed(0)
    plain = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4, **settings)}).eval().double()
    first = settings.get("batch_first", False)
    x = (X if first else X.transpose(0, 1)).double()
    masks = {
        "none": {},
        "boolean": {"attn_mask": CAUSAL.T},
        "additive": {"attn_mask": noise_like(torch.empty(7, 7)).double()},
        "by head": {"attn_mask": noise_like(torch.empty(8, 7, 7)) > 0.8},
        "both": {"attn_mask": CAUSAL.T.roll(1, 0) & CAUSAL.T, "key_padding_mask": PADDING.flip(1)},
    }[mask]
    key, value = x, x
    if "kdim" in settings:
        key, value = noise_like(torch.empty(7, 2, 12)).double(), noise_like(torch.empty(7, 2, 20)).double()
    hosted = copy.deepcopy(plain)

    class Call(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["attention"](x, x if key is value else key, x if key is value else value, **masks)[0]

    sparsify(Call(hosted), "dense", example_inputs=x)
    got, wanted = (Call(model)(x) for model in (hosted, plain))
    real = torch.ones(2, 7, dtype=torch.bool) if mask != "both" or key is not value else ~PADDING.flip(1)
    real = real if first else real.T
    assert_close(got[real], wanted[real].nan_to_num(), atol=1e-10, rtol=1e-10)


def test_unbatched_input_and_weights() -> None:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(32, 4).eval()
    hosted = mount(copy.deepcopy(plain), Dense)
    x = X[0]
    assert_close(hosted(x, x, x)[0], plain(x, x, x)[0])
    assert hosted(x, x, x)[1] is None
    for inputs in (x, X):
        for average in (True, False):
            asked = {"need_weights": True, "average_attn_weights": average}
            for got, wanted in zip(hosted(*[inputs] * 3, **asked), plain(*[inputs] * 3, **asked), strict=True):
                assert_close(got, wanted)
    with pytest.raises(ValueError, match="add_bias_kv"):
        mount(nn.MultiheadAttention(32, 4, add_bias_kv=True), Dense)


def test_dropout_of_multi_head_attention_is_passed_on() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 40, dropout=0.3, batch_first=True))
    sparsify(model, "dense")
    assert [m.dropout for m in model.modules() if isinstance(m, Mechanism)] == [0.3]
    with pytest.raises(ValueError, match="attention dropout to 0"):
        sparsify(nn.Sequential(nn.TransformerEncoderLayer(32, 4, 40, dropout=0.3)), "yoso")


def test_a_mechanism_that_samples_the_value_projection_learns_what_it_was() -> None:
    plain, hosted = encoder(True), encoder(True)
    sparsify(hosted, "mca", alpha=1e-6)
    losses = [model(X).square().mean() for model in (plain, hosted)]
    assert_close(*losses, atol=1e-4, rtol=1e-4)
    for loss in losses:
        loss.backward()
    for old, new in zip(plain.parameters(), hosted.parameters(), strict=True):
        assert_close(new.grad, old.grad, atol=1e-3, rtol=1e-3)


def test_every_host_says_where_it_is() -> None:
    model = encoder()
    names = sparsify(model, "mean", where=r"layers\.1")
    assert mounted(model) == {names[0]: "MultiheadAttention: Mean(heads=4, head_dim=8, noncausal_self)"}
    assert isinstance(model.layers[1].self_attn, Host)


class TwoWays(nn.Module):
    """Text goes through one attention, images through another, which reads them by one learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.MultiheadAttention(32, 4, batch_first=True)
        self.probe = nn.Parameter(torch.randn(1, 1, 32))

    def forward(self, x: Tensor, image: bool = False) -> Tensor:
        if image:
            return self.head(self.probe.expand(len(x), -1, -1), x, x, need_weights=False)[0]
        return self.text(x, x, x, need_weights=False)[0]


def test_attention_that_example_inputs_do_not_reach_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = TwoWays().eval(), torch.randn(2, 7, 32)
    wanted = model(x, image=True)
    assert sparsify(model, "dense", example_inputs=x) == ["text"]
    assert "do not reach head" in caplog.text
    assert torch.equal(model(x, image=True), wanted)
    with pytest.raises(ValueError, match=r"no attention module matches 'head'.*example inputs do not reach head"):
        sparsify(model, "dense", where="head", example_inputs=x)
    assert sparsify(model, "dense", where="head", example_inputs=(x, True)) == ["head"]
    assert_close(model(x, image=True), wanted)
