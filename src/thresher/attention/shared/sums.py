"""Running sums over the tokens of a growing cache, for the tail of a single query."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thresher.attention.shared.functional import promote_to_fp32


class TokenSums(NamedTuple):
    """Sums of the visible keys, and of their values, in the type of sums."""

    keys: Float[Tensor, "b hk d"]
    values: Float[Tensor, "b hk dv"]


class RunningSums:
    """Sums over the visible keys and values of a growing cache; each reading adds the tokens since the last one."""

    def __init__(self) -> None:
        self.tokens = 0  # that are in the sums
        self.seen: Tensor | None = None
        self.sums: TokenSums | None = None

    def read(
        self, k: Float[Tensor, "b hk m d"], v: Float[Tensor, "b hk m dv"], seen: Bool[Tensor, "b m"] | None
    ) -> TokenSums:
        """Return the sums over all tokens so far; a mask that changes for earlier tokens begins again.

        Args:
            k: All keys.
            v: All values.
            seen: Keys that are visible; None means all.
        """
        start = self.tokens if self._continues(seen, k.shape[2]) else 0
        shown = None if seen is None else seen[:, None, start:, None]
        new = TokenSums(*(sum_tokens(tokens[:, :, start:], shown) for tokens in (k, v)))
        old = self.sums if start else None
        self.sums = new if old is None else TokenSums(*(a + b for a, b in zip(old, new, strict=True)))
        self.tokens, self.seen = k.shape[2], seen
        return self.sums

    def select(self, rows: slice | Int[Tensor, " b"]) -> "RunningSums":
        """Return the sums of some examples."""
        other = RunningSums()
        other.tokens, other.seen = self.tokens, None if self.seen is None else self.seen[rows]
        other.sums = self.sums and TokenSums(*(x[rows] for x in self.sums))
        return other

    def _continues(self, seen: Tensor | None, m: int) -> bool:
        if self.sums is None or self.tokens > m:
            return False
        if seen is None or self.seen is None:
            return seen is self.seen
        return torch.equal(seen[:, : self.tokens], self.seen)


def sum_tokens(tokens: Tensor, shown: Tensor | None) -> Tensor:
    """Sum tokens [b, h, m, d] over those that are shown; None shows all."""
    tokens = promote_to_fp32(tokens)
    return (tokens if shown is None else tokens.masked_fill(~shown, 0)).sum(2)
