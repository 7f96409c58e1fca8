"""A transformer in one file: encoder, decoder and both together, the smallest model that uses all four patterns.

Blocks are pre-norm with a GELU feed-forward layer; positions are learned. Tokens are ids [b, n], and id 0 is padding
wherever it stands: padded tokens are hidden from attention on both sides.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from thresher.attention.base import Call, MakeMechanism, Pattern, ValueSource
from thresher.hosts.core import Host, MakeFeedForward, mount_feed_forward
from thresher.hosts.feedforward import FeedForwardHost

PADDING = 0


class Attention(nn.Module):
    """Multi-head attention around a mechanism.

    Args:
        dim: Width of the tokens; heads divide it evenly.
        num_heads: Number of heads.
        make: Builds the mechanism.
        pattern: Where this attention is used.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or the mechanism does not support the pattern.
    """

    def __init__(self, dim: int, num_heads: int, make: MakeMechanism, pattern: Pattern) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"a width of {dim} cannot be shared evenly by {num_heads} heads")
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.num_heads = num_heads
        self.mechanism = make(num_heads=num_heads, head_dim=dim // num_heads, pattern=pattern)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b m c"],
        queries: Bool[Tensor, "b n"] | None,
        keys: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b n c"]:
        """Attend from x to memory, which is x itself in self attention; True is visible."""
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(memory), self.v(memory))
        )
        source = ValueSource(memory, self.v.weight, self.v.bias) if self.mechanism.needs_source else None
        attended = self.mechanism(q, k, v, Call(queries=queries, keys=keys, source=source))
        mixed: Tensor = self.out(attended.out.transpose(1, 2).flatten(2))
        return mixed


class FeedForward(nn.Sequential):
    """Two projections with a GELU between them."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim))


@mount_feed_forward.register
def _(module: FeedForward, make: MakeFeedForward) -> Host:
    return FeedForwardHost(module, make, inner=("0",), outer="3", activation="1", dropout="2")


class Block(nn.Module):
    """Self attention, cross attention if there is a memory to attend to, and a feed-forward layer."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        make: MakeMechanism,
        *,
        causal: bool,
        cross: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, make, Pattern((causal, False)))
        self.norm2 = nn.LayerNorm(dim) if cross else None
        self.cross = Attention(dim, num_heads, make, Pattern((causal, True))) if cross else None
        self.norm3 = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, ffn_dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, visible: Tensor | None, memory: Tensor | None, memory_visible: Tensor | None
    ) -> Float[Tensor, "b n c"]:
        y = self.norm1(x)
        x = x + self.dropout(self.attn(y, y, visible, visible))
        if self.cross is not None and self.norm2 is not None:
            assert memory is not None
            x = x + self.dropout(self.cross(self.norm2(x), memory, visible, memory_visible))
        out: Tensor = x + self.dropout(self.ffn(self.norm3(x)))
        return out


class Stack(nn.Module):
    """Embedding, positions, blocks and a last norm: an encoder, or with `causal` and `cross` a decoder.

    Args:
        make: Builds the mechanism of each attention.
        vocabulary: Number of token ids, padding included.
        length: Largest number of tokens.
        dim: Width.
        depth: Number of blocks.
        num_heads: Heads of each attention.
        ffn_dim: Width of the feed-forward layers.
        causal: Whether no token may depend on later ones.
        cross: Whether blocks attend to a memory too.
        dropout: Of embeddings and of each sublayer.
    """

    def __init__(
        self,
        make: MakeMechanism,
        *,
        vocabulary: int,
        length: int,
        dim: int,
        depth: int,
        num_heads: int,
        ffn_dim: int,
        causal: bool = False,
        cross: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=PADDING)
        self.positions = nn.Parameter(torch.empty(length, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, ffn_dim, make, causal=causal, cross=cross, dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        for weight in (self.embedding.weight, self.positions):
            nn.init.normal_(weight, std=0.02)

    def forward(
        self,
        tokens: Int64[Tensor, "b n"],
        memory: Float[Tensor, "b m c"] | None = None,
        memory_visible: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Return the states of all tokens, those of padding included.

        Raises:
            ValueError: There are more tokens than positions.
        """
        n = tokens.shape[1]
        if n > len(self.positions):
            raise ValueError(f"{n} tokens, but positions for {len(self.positions)}: raise the length of the model")
        visible = tokens != PADDING
        x = self.dropout(self.embedding(tokens) + self.positions[:n])
        for block in self.blocks:
            x = block(x, visible, memory, memory_visible)
        states: Tensor = self.norm(x)
        return states


class EncoderDecoder(nn.Module):
    """An encoder whose states a decoder attends to; returns the decoder's states.

    Args:
        make: Builds the mechanism of each attention.
        causal: Whether the decoder is; False gives a decoder that sees its whole input.
        **size: See `Stack`.
    """

    def __init__(self, make: MakeMechanism, *, causal: bool = True, **size: int | float) -> None:
        super().__init__()
        self.encoder = Stack(make, **size)  # type: ignore[arg-type]
        self.decoder = Stack(make, causal=causal, cross=True, **size)  # type: ignore[arg-type]

    def forward(self, source: Int64[Tensor, "b m"], target: Int64[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
        states: Tensor = self.decoder(target, self.encoder(source), source != PADDING)
        return states

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay spares besides vectors."""
        return {f"{part}.{name}" for part in ("encoder", "decoder") for name in ("positions", "embedding.weight")}


class Classifier(nn.Module):
    """An encoder, the mean of its visible tokens, and a small head: the standard of Long Range Arena's small models.

    Args:
        make: Builds the mechanism of each attention.
        num_classes: Number of logits.
        dim: Width of the encoder; the head is twice as wide.
        **size: See `Stack`.
    """

    def __init__(self, make: MakeMechanism, *, num_classes: int, dim: int, **size: int | float) -> None:
        super().__init__()
        self.encoder = Stack(make, dim=dim, **size)  # type: ignore[arg-type]
        self.head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, num_classes))

    def forward(self, tokens: Int64[Tensor, "b n"]) -> Float[Tensor, "b classes"]:
        visible = (tokens != PADDING)[..., None]
        states = self.encoder(tokens).masked_fill(~visible, 0)
        logits: Tensor = self.head(states.sum(1) / visible.sum(1).clamp_min(1))
        return logits

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay spares besides vectors."""
        return {"encoder.positions", "encoder.embedding.weight"}
