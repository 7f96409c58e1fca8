"""A small transformer that uses all four patterns: encoder, decoder, and both together.

Blocks are pre-norm with a GELU feed-forward layer; positions are learned. Tokens are ids [b, n]. One id is padding;
attention hides it among queries and keys. Language models share the token embedding with their output layer.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from thresher.attention.contract import Call, Pattern, ValueSource
from thresher.attention.mechanism import MakeMechanism
from thresher.attention.options import check_integer, check_number
from thresher.hosts.core import Host
from thresher.hosts.feedforward import FeedForwardHost, MakeFeedForward, mount_feed_forward

SPARED = ("positions", "embedding.weight")  # without weight decay, like vectors


class Attention(nn.Module):
    """Multi-head attention around a mechanism.

    Args:
        dim: Width of the tokens; heads divide it evenly.
        num_heads: Number of heads.
        make: Builds the mechanism.
        pattern: Pattern of the attention.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or the mechanism does not support the pattern.
    """

    def __init__(self, dim: int, num_heads: int, make: MakeMechanism, pattern: Pattern) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"model.dim={dim}, the width, cannot be shared evenly by model.num_heads={num_heads}")
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
        """Attend from x to memory, which is x in self attention; True means visible."""
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
    """Self attention, optional cross attention, and a feed-forward layer."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        make: MakeMechanism,
        *,
        causal: bool,
        cross: MakeMechanism | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, make, Pattern((causal, False)))
        self.norm2 = nn.LayerNorm(dim) if cross else None
        self.cross = Attention(dim, num_heads, cross, Pattern((causal, True))) if cross else None
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


def find_after_first(separator: int, tokens: Int64[Tensor, "b n"]) -> Bool[Tensor, "b n"]:
    """Find the tokens after the first `separator` of their row."""
    found = tokens == separator
    return found.cumsum(1) > found


class Stack(nn.Module):
    """Embedding, positions, blocks and a final norm: an encoder, or a decoder with `causal` and `cross`.

    Args:
        make: Builds the mechanism of each self attention.
        vocabulary: Number of token ids, padding included.
        length: Largest number of tokens.
        dim: Width.
        depth: Number of blocks.
        num_heads: Heads of each attention.
        ffn_dim: Width of the feed-forward layers.
        causal: Whether tokens must not depend on later ones.
        cross: Builds the mechanism of each cross attention; None builds no cross attention.
        dropout: Dropout of embeddings and of each sublayer.
        padding: Token id of padding; negative if every id of the vocabulary is a token.
        separator: Token id whose first occurrence ends the first text of a pair; tokens of the second text get an
            additional embedding. None without pairs.
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
        cross: MakeMechanism | None = None,
        dropout: float = 0.0,
        padding: int = 0,
        separator: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "depth": depth, "num_heads": num_heads, "ffn_dim": ffn_dim}
        for name, size in sizes.items():
            check_integer(f"model.{name}", size, 1)
        check_number("model.dropout", dropout, least=0.0, below=1.0)
        self.padding = padding
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=None if padding < 0 else padding)
        self.positions = nn.Parameter(torch.empty(length, dim))
        self.separator = separator
        if separator is not None:
            self.second = nn.Parameter(torch.zeros(dim))
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
        """Compute the states of all tokens, padding included.

        Raises:
            ValueError: There are more tokens than positions.
        """
        n = tokens.shape[1]
        if n > len(self.positions):
            raise ValueError(f"{n} tokens, but positions for {len(self.positions)}: raise the length of the model")
        visible = tokens != self.padding
        x = self.embedding(tokens if self.padding >= 0 else tokens.clamp_min(0)) + self.positions[:n]
        if self.separator is not None:
            x = x + find_after_first(self.separator, tokens)[..., None] * self.second
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, visible, memory, memory_visible)
        states: Tensor = self.norm(x)
        return states


class LanguageModel(nn.Module):
    """A stack that predicts tokens: next tokens if causal, masked tokens otherwise.

    Args:
        make: Builds the mechanism of each attention.
        **size: See `Stack`.
    """

    def __init__(self, make: MakeMechanism, **size: Any) -> None:
        super().__init__()
        self.stack = Stack(make, **size)

    def forward(self, tokens: Int64[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        logits: Tensor = self.stack(tokens) @ self.stack.embedding.weight.mT
        return logits

    def no_weight_decay(self) -> set[str]:
        """List the parameters without weight decay, besides vectors."""
        return {f"stack.{name}" for name in SPARED}


class EncoderDecoder(nn.Module):
    """An encoder and a decoder that attends to its states and predicts tokens.

    Args:
        encoder: Builds the mechanism of each self attention of the encoder.
        decoder: Builds the mechanism of each self attention of the decoder.
        cross: Builds the mechanism of each attention of the decoder to the encoder.
        causal: Whether the decoder is causal; otherwise it sees its whole input.
        **size: See `Stack`.
    """

    def __init__(
        self, encoder: MakeMechanism, decoder: MakeMechanism, cross: MakeMechanism, *, causal: bool = True, **size: Any
    ) -> None:
        super().__init__()
        self.encoder = Stack(encoder, **size)
        self.decoder = Stack(decoder, causal=causal, cross=cross, **size)

    def forward(self, source: Int64[Tensor, "b m"], target: Int64[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        states = self.decoder(target, self.encoder(source), source != self.encoder.padding)
        logits: Tensor = states @ self.decoder.embedding.weight.mT
        return logits

    def no_weight_decay(self) -> set[str]:
        """List the parameters without weight decay, besides vectors."""
        return {f"{part}.{name}" for part in ("encoder", "decoder") for name in SPARED}


class Classifier(nn.Module):
    """An encoder, the mean of its visible tokens, and a small head, as in the small models of Long Range Arena.

    Args:
        make: Builds the mechanism of each attention.
        num_classes: Number of logits.
        dim: Width of the encoder; the head is twice as wide.
        **size: See `Stack`.
    """

    def __init__(self, make: MakeMechanism, *, num_classes: int, dim: int, **size: Any) -> None:
        super().__init__()
        self.encoder = Stack(make, dim=dim, **size)
        self.head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, num_classes))

    def forward(self, tokens: Int64[Tensor, "b n"]) -> Float[Tensor, "b classes"]:
        visible = (tokens != self.encoder.padding)[..., None]
        states = self.encoder(tokens).masked_fill(~visible, 0)
        logits: Tensor = self.head(states.sum(1) / visible.sum(1).clamp_min(1))
        return logits

    def no_weight_decay(self) -> set[str]:
        """List the parameters without weight decay, besides vectors."""
        return {f"encoder.{name}" for name in SPARED}
