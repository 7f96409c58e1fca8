"""Masks of other libraries: what hides, what is causal, and what a call may show that its pattern does not."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.hosts.test_sdpa import Net
from thresher import sparsify
from thresher.attention import available
from thresher.hosts import mounted
from thresher.hosts.__main__ import TOKENS, build
from thresher.hosts.masks import find_visible, hides_future, read_mask
from thresher.testing.inputs import noise_like

N = 7
X = noise_like(torch.empty(2, N, 32))
CAUSAL = torch.ones(N, N, dtype=torch.bool).tril()
PREFIX = CAUSAL.clone()
PREFIX[:4, :4] = True
PADDED = torch.tensor([[True] * N, [True] * 4 + [False] * 3])
LEFT = PADDED.flip(1)[:, None, None] & CAUSAL
OPENED = (LEFT | ~LEFT.any(-1, keepdim=True))[1:]
LAST_UNSEEN = torch.ones(N, N, dtype=torch.bool)
LAST_UNSEEN[: N - 1, N - 1] = False
FEW_QUERIES = torch.ones(N, N, dtype=torch.bool)  # the first two see some of the others, which see everything
FEW_QUERIES[0, 3:5] = FEW_QUERIES[1, 2:4] = False
NARROW = torch.ones(N, N, dtype=torch.bool).tril(1).triu(-1)
LOWS = {
    "-inf": (-math.inf, torch.float32),
    "finfo.min": (torch.finfo(torch.float32).min, torch.float32),
    "half of finfo.min": (torch.finfo(torch.float32).min / 2, torch.float32),
    "-1e9": (-1e9, torch.float32),
    "-1e4": (-1e4, torch.float32),
    "fp16: -inf": (-math.inf, torch.float16),
    "fp16: finfo.min": (torch.finfo(torch.float16).min, torch.float16),
    "fp16: -1e4": (-1e4, torch.float16),
    "bf16: -inf": (-math.inf, torch.bfloat16),
    "bf16: -1e9": (-1e9, torch.bfloat16),
    "bf16: -1e4": (-1e4, torch.bfloat16),
}
MECHANISMS = [name for name in available() if name != "mca"]  # which needs to know what values are projected from


def additive(visible: Tensor, low: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, low)


class Layer(nn.Module):
    """PyTorch's own multi-head attention, given whatever mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mask = mask if mask.ndim == 2 else mask.expand(len(x), 4, N, N).flatten(0, 1)
        hidden = ~mask if mask.dtype == torch.bool else mask
        return self.attn(x, x, x, attn_mask=hidden, need_weights=False)[0]


class Blocks(nn.Module):
    """timm's attention, given whatever mask."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = build("timm ViT").blocks

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        return x


class Language(nn.Module):
    """A model of transformers, given a four-dimensional mask."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = build(name)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.model(inputs_embeds=x, attention_mask=mask.expand(len(x), 1, N, N)).logits


HOSTS: dict[str, tuple[Any, dict[str, Tensor]]] = {
    "sdpa": (lambda: Net(), {"causal": CAUSAL, "padding": PADDED[:, None, None], "pairs": NARROW}),
    "multihead": (Layer, {"causal": CAUSAL, "padding": PADDED[:, None, None].expand(-1, 4, N, -1), "pairs": NARROW}),
    "timm": (Blocks, {"padding": PADDED[:, None, None], "pairs": NARROW}),
    "BERT": (lambda: Language("BERT"), {"padding": PADDED[:, None, None], "pairs": NARROW}),
    "Llama": (lambda: Language("Llama"), {"causal": CAUSAL, "padding": PADDED[:, None, None] & CAUSAL}),
}


def mounted_net(host: str, mask: Tensor, attention: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    dtype = mask.dtype if mask.is_floating_point() else torch.float32
    net = HOSTS[host][0]().eval().to(dtype)
    inputs = None if host == "timm" else {"x": X.to(dtype), "mask": mask}
    torch.manual_seed(1)
    sparsify(net, attention, example_inputs=inputs, **settings)
    return net


@pytest.mark.parametrize("attention", MECHANISMS)
@pytest.mark.parametrize("host", HOSTS)
def test_whatever_hides_hides_alike(host: str, attention: str) -> None:
    for visible in HOSTS[host][1].values():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            lows = [low for low, of in LOWS.values() if of is dtype]
            net = mounted_net(host, additive(visible, lows[-1], dtype), attention)
            with torch.no_grad():
                wanted, *others = (net(X.to(dtype), mask=additive(visible, low, dtype)) for low in lows)
            for low, out in zip(lows[1:], others, strict=True):
                assert torch.equal(out, wanted), (dtype, low)


@pytest.mark.parametrize("attention", MECHANISMS)
@pytest.mark.parametrize("host", ["sdpa", "multihead", "Llama"])
def test_the_future_hidden_by_a_large_number_stays_hidden(host: str, attention: str) -> None:
    mask = additive(CAUSAL, -1e9)
    net = mounted_net(host, mask, attention)
    later = X.clone()
    later[:, 4:] += 1
    with torch.no_grad():
        assert torch.equal(net(X, mask=mask)[:, :4], net(later, mask=mask)[:, :4])


@pytest.mark.parametrize(("low", "dtype"), LOWS.values(), ids=LOWS)
def test_a_bias_that_hides_is_a_mask_and_the_rest_of_it_a_bias(low: float, dtype: torch.dtype) -> None:
    bias = (noise_like(torch.empty(2, 4, N, N)) * 10).to(dtype)
    for visible in (CAUSAL.expand(2, 4, N, N), PADDED[:, None, None].expand(2, 4, N, N)):
        masked = read_mask(bias + additive(visible, low, dtype), 2, N, N)
        assert masked.pairs is not None
        assert masked.bias is not None
        assert torch.equal(masked.pairs, visible)
        assert torch.equal(masked.bias[visible], bias[visible])


def test_shifted_windows_hide_by_minus_100() -> None:
    bias = noise_like(torch.empty(1, 4, N, N))
    assert torch.equal(find_visible(bias + additive(NARROW, -100.0)), NARROW.expand(1, 4, N, N))


def test_what_softmax_still_weighs_stays_visible() -> None:
    for offset in (0.0, 50.0, -200.0, 1e4):
        bias = torch.linspace(-80, 0, N) + offset  # T5's, ALiBi's, relative to whatever key
        assert find_visible(bias.expand(1, 1, N, N)).all()
    far = torch.tensor([[-700.0, -300.0, 0.0]])
    assert find_visible(far).tolist() == [[False, False, True]]
    assert find_visible(far.double()).tolist() == [[True, True, True]]
    assert find_visible(torch.tensor([[0.0, math.nan]])).all()  # a mask of nan is an error to be seen, not hidden


def test_a_row_of_low_numbers_sees_nothing() -> None:
    for low, dtype in LOWS.values():
        assert not find_visible(torch.full((2, 3), low, dtype=dtype)).any()


@pytest.mark.parametrize(
    ("mask", "causal"),
    [
        (CAUSAL, True),
        (additive(CAUSAL, -1e9), True),
        (additive(CAUSAL, -math.inf) + noise_like(torch.empty(N, N)), True),
        (PREFIX, True),
        (CAUSAL & ~CAUSAL.tril(-3), True),  # a sliding window
        (CAUSAL & torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).bool(), True),  # packed
        ((CAUSAL & PADDED[:, None, None]) | False, True),
        ((CAUSAL & PADDED.flip(1)[:, None, None]) | False, True),
        (torch.ones(N, N, dtype=torch.bool), False),
        (NARROW, False),
        (PADDED[:, None, None].expand(-1, 1, N, -1), False),
        (PADDED.flip(1)[:, None, None].expand(-1, 1, N, -1), False),
        (PADDED[:, None, None] & PADDED[:, None, :, None], False),
        (CAUSAL.T, False),
        (noise_like(torch.empty(1, 4, N, N)) > 0, False),
        (torch.ones(1, 1, dtype=torch.bool), False),
        (CAUSAL[:2, :2], True),
        (CAUSAL[:3, :3], True),
        (OPENED, True),  # padding at the left, whose rows see everything so that they are not NaN
        (torch.stack([CAUSAL, CAUSAL.T]), True),  # one example is enough
        (PADDED[:, None, None] | torch.eye(N, dtype=torch.bool), False),  # padding at the right sees itself
        (LAST_UNSEEN, False),
        (FEW_QUERIES, False),
        (torch.ones(3, 5, dtype=torch.bool).tril(2), False),  # cross attention, or a cache
    ],
)
def test_a_causal_mask_is_known(mask: Tensor, causal: bool) -> None:
    assert bool(hides_future(mask)) == causal


FOLLOWING = ["dense", "mean", "latte", "topk", "yoso"]


@pytest.mark.parametrize("attention", [*FOLLOWING, "none"])
@pytest.mark.parametrize("host", ["sdpa", "multihead", "Llama"])
def test_a_mask_that_shows_the_future_is_followed(host: str, attention: str) -> None:
    """A prefix sees itself, and what follows sees the past: rows of a prefix depend on all of it, and on no more."""
    for example in (CAUSAL, PREFIX):  # the pattern is causal either way
        net = mounted_net(host, additive(example, -math.inf), attention)
        for mask in (PREFIX, additive(PREFIX, -1e9)):
            changed, after = X.clone(), X.clone()
            changed[:, 3] += 1
            after[:, 4] += 1
            with torch.no_grad():
                out, of_prefix, of_rest = (net(x, mask=mask) for x in (X, changed, after))
            assert torch.equal(out[:, :4], of_rest[:, :4])
            moved = (out - of_prefix).abs().amax((0, 2)) > 0
            assert moved.tolist() == [attention != "none"] * 3 + [True] + [attention != "none"] * 3


@pytest.mark.parametrize(
    ("attention", "settings"),
    [("dense", {}), ("topk", {"keys": 100}), ("latte", {"threshold": math.inf, "estimate": {"bits": "exact"}})],
)
@pytest.mark.parametrize("host", ["sdpa", "multihead", "Llama"])
def test_a_prefix_is_served_as_the_plain_model_does(host: str, attention: str, settings: Any) -> None:
    torch.manual_seed(0)
    plain = HOSTS[host][0]().eval()
    net = mounted_net(host, additive(CAUSAL, -math.inf), attention, **settings)
    with torch.no_grad():
        assert_close(net(X, mask=PREFIX), plain(X, mask=PREFIX), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("host", ["sdpa", "multihead", "Llama"])
def test_a_mechanism_that_needs_the_order_refuses_the_future(host: str) -> None:
    net = mounted_net(host, additive(CAUSAL, -math.inf), "smyrf", cluster=2)
    net(X, mask=CAUSAL)
    with pytest.raises(ValueError, match=r"Smyrf takes causal self attention in the order of tokens.*latte"):
        net(X, mask=PREFIX)


def test_padding_alone_is_no_causal_mask() -> None:
    for host, attention in (("sdpa", "dense"), ("Llama", "topk")):
        net = mounted_net(host, additive(CAUSAL, -math.inf), attention)
        with pytest.raises(ValueError, match="mounted as causal_self and is called with a mask that is not causal"):
            net(X, mask=PADDED[:, None, None])


@pytest.mark.parametrize("host", ["sdpa", "multihead", "timm", "BERT"])
def test_a_causal_mask_is_refused_where_it_would_leak(host: str) -> None:
    for attention in ("latte", "smyrf"):
        net = mounted_net(host, NARROW, attention)
        net(X, mask=NARROW)
        with pytest.raises(ValueError, match="mounted as noncausal_self and is called with a causal mask"):
            net(X, mask=CAUSAL)
    later = X.clone()
    later[:, 4:] += 1
    for attention, settings in (("topk", {}), ("latte", {"estimate": {"bits": "exact"}, "threshold": 0.3})):
        net = mounted_net(host, NARROW, attention, **settings)
        assert torch.equal(net(X, mask=CAUSAL)[:, :4], net(later, mask=CAUSAL)[:, :4])


def test_a_mask_of_whole_numbers_is_refused() -> None:
    for dtype in (torch.int64, torch.uint8):
        with pytest.raises(ValueError, match=r"boolean, True where visible.*call \.bool\(\)"):
            read_mask(CAUSAL.to(dtype), 2, N, N)


@pytest.mark.parametrize("host", ["sdpa", "multihead", "Llama"])
def test_what_a_mask_forbids_is_refused_when_it_is_mounted(host: str) -> None:
    torch.manual_seed(0)
    net = HOSTS[host][0]().eval()
    with pytest.raises(ValueError, match="in the order of tokens"):
        sparsify(net, "smyrf", cluster=2, example_inputs={"x": X, "mask": additive(PREFIX, -math.inf)})
    assert not mounted(net)


@pytest.mark.usefixtures("unchecked_shapes")
@torch.no_grad()
def test_compiled_hosts_check_masks_without_waiting() -> None:
    net = mounted_net("sdpa", additive(CAUSAL, -math.inf), "smyrf", cluster=2)
    compiled = torch.compile(net, backend="eager")
    assert_close(compiled(X, mask=CAUSAL), net(X, mask=CAUSAL))
    with pytest.raises(RuntimeError, match="in the order of tokens"):
        compiled(X, mask=PREFIX)


def test_padding_by_rule_equals_padding_in_a_mask_of_pairs() -> None:
    model = build("Llama")
    sparsify(model, "topk", keys=3)
    real = PADDED.flip(1)
    by_rule = model(TOKENS, attention_mask=real.long()).logits
    whole = model(TOKENS, attention_mask=(CAUSAL & real[:, None, None]).expand(2, 1, N, N)).logits
    assert_close(by_rule[real], whole[real])
