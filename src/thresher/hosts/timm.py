"""Host for timm: the attention of ViT, DeiT, DeiT-3, DINOv2 and their relatives, and timm's feed-forward layers."""

from timm.layers.attention import Attention
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from thresher.attention.contract import Call, Pattern, ValueSource
from thresher.attention.mechanism import MakeMechanism, Mechanism
from thresher.hosts.core import Host, mount
from thresher.hosts.feedforward import FeedForwardHost, MakeFeedForward, mount_feed_forward
from thresher.hosts.masks import check_mask_pattern, find_visible_queries, read_mask
from thresher.hosts.tracing import create_node, find_proxy


class TimmAttention(Host):
    """timm's multi-head self attention around a mechanism."""

    mechanism: Mechanism
    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    gate: nn.Module | None
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, original: Attention, make: MakeMechanism) -> None:
        mechanism = make(num_heads=original.num_heads, head_dim=original.head_dim, pattern=Pattern.NONCAUSAL_SELF)
        super().__init__(original, mechanism, dropout=original.attn_drop.p)
        if original.gate is None:
            self.gate = None
        self.num_heads, self.head_dim = original.num_heads, original.head_dim

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend over tokens [b, n, c]; `attn_mask` broadcasts to [b, heads, n, n], boolean or additive."""
        b, n, _ = x.shape
        gate = None if self.gate is None else self.gate(x).sigmoid()
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        source = self.build_source(x) if self.mechanism.needs_source else None
        given = (q, k, v, attn_mask, is_causal, source)
        proxy = find_proxy(given)
        out = attend(self.mechanism, *given) if proxy is None else create_node(attend, self.mechanism, proxy, given)
        x = self.norm(out.transpose(1, 2).reshape(b, n, -1))
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))

    def build_source(self, x: Tensor) -> ValueSource:
        """Build the source of the values: the last third of the joint projection."""
        if not isinstance(self.qkv, nn.Linear):
            raise TypeError(
                f"values are projected by a {type(self.qkv).__name__}, not by a Linear whose weight can be read"
            )
        size = self.num_heads * self.head_dim
        bias = self.qkv.bias
        return ValueSource(x, self.qkv.weight[-size:], None if bias is None else bias[-size:])


def attend(
    mechanism: Mechanism,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    source: ValueSource | None,
) -> Tensor:
    """Attend by a mechanism with a mask of timm; torch.fx traces this as one function."""
    if is_causal:
        raise ValueError("this attention was mounted as noncausal; a causal call would need another mechanism")
    b, _, n, _ = q.shape
    if attn_mask is not None:
        check_mask_pattern(mechanism, attn_mask, n, n)
    masked = read_mask(attn_mask, b, n, n)
    queries = find_visible_queries(mechanism, masked.keys, n)
    out: Tensor = mechanism(q, k, v, Call(queries=queries, source=source, **masked._asdict())).out
    return out


@mount.register
def _(module: Attention, make: MakeMechanism) -> Host:
    if type(module).forward is not Attention.forward:
        raise TypeError(f"{type(module).__name__} overrides forward; this host supports timm's Attention only")
    return TimmAttention(module, make)


@mount_feed_forward.register
def _(module: Mlp, make: MakeFeedForward) -> Host:
    return FeedForwardHost(module, make, inner=("fc1",), outer="fc2", activation="act", dropout="drop1", after="drop2")


@mount_feed_forward.register
def _(module: GluMlp, make: MakeFeedForward) -> Host:
    return FeedForwardHost(
        module,
        make,
        inner=("fc1",),
        outer="fc2",
        activation="act",
        dropout="drop1",
        packed="gate last" if module.gate_last else "gate first",
        after="drop2",
    )


@mount_feed_forward.register
def _(module: SwiGLU, make: MakeFeedForward) -> Host:
    return FeedForwardHost(
        module, make, inner=("fc1_g", "fc1_x"), outer="fc2", activation="act", dropout="drop1", after="drop2"
    )
