"""Who sees whom: padding, causality and explicit pairs, as masks, as hidden tokens and as counts.

Masks are boolean, True is visible, and None is "everything", which costs nothing to apply. Only `visible_pairs` makes
a mask of pairs, of as many rows as it is asked for; the rest takes time and memory linear in the number of tokens,
unless the call itself brings a mask of pairs.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from thresher.attention.base import Call, Pattern


def no_pairs(q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk m d"]) -> bool:
    """Say whether there is no pair at all, hidden or not: no example, no query or no key."""
    return 0 in (q.shape[0], q.shape[2], k.shape[2])


def visible_pairs(
    call: "Call", pattern: "Pattern", n: int, m: int, device: torch.device, rows: range | None = None
) -> Bool[Tensor, "#b #h #n m"] | None:
    """Combine causality, padding and `call.pairs` into one broadcastable mask, or None if all is visible.

    With fewer queries than keys a causal mask is aligned to the lower right: the queries are the last ones.

    Args:
        call: What the call knows.
        pattern: Where attention is used.
        n: Number of queries.
        m: Number of keys.
        device: Where the mask is wanted.
        rows: Consecutive queries to make the mask for; all by default.

    Raises:
        ValueError: Causal self attention with more queries than keys.
    """
    rows = range(n) if rows is None else rows
    chosen = slice(rows.start, rows.stop)
    visible: Tensor | None = None
    if _sees_past_only(pattern, n, m):
        visible = torch.ones(len(rows), m, dtype=torch.bool, device=device).tril(m - n + rows.start)[None, None]
    for part in (
        None if call.keys is None else call.keys[:, None, None, :],
        None if call.queries is None else call.queries[:, None, chosen, None].expand(-1, -1, -1, m),
        None if call.pairs is None else call.pairs[:, :, chosen],
    ):
        if part is not None:
            visible = part if visible is None else visible & part
    return visible


def seen_tokens(
    call: "Call", pattern: "Pattern", n: int, m: int
) -> tuple[Bool[Tensor, "#b #h n"] | None, Bool[Tensor, "#b #h m"] | None]:
    """Return which queries see any key, and which keys are seen by any query; None is "all"."""
    if call.pairs is not None:
        visible = visible_pairs(call, pattern, n, m, call.pairs.device)
        assert visible is not None
        return visible.any(-1), visible.any(-2)
    given = call.keys if call.queries is None else call.queries
    if given is None:
        _sees_past_only(pattern, n, m)
        return None, None
    queries = given.new_ones(len(given), n) if call.queries is None else call.queries
    keys = given.new_ones(len(given), m) if call.keys is None else call.keys
    if _sees_past_only(pattern, n, m):
        some_key = keys.cumsum(-1)[:, m - n :] > 0
        later = queries.flip(-1).cumsum(-1).flip(-1) > 0
        some_query = torch.cat([queries.any(-1, keepdim=True).expand(-1, m - n), later], -1)
    else:
        some_key, some_query = keys.any(-1, keepdim=True), queries.any(-1, keepdim=True)
    return (queries & some_key)[:, None], (keys & some_query)[:, None]


def count_seen_tokens(
    call: "Call", pattern: "Pattern", n: int, m: int, like: Float[Tensor, "b h"]
) -> tuple[Float[Tensor, "b h"], Float[Tensor, "b h"]]:
    """Count the queries that see any key, and the keys that are seen, for each example and head of `like`."""
    queries, keys = seen_tokens(call, pattern, n, m)
    counts = (
        torch.zeros_like(like) + (size if seen is None else seen.sum(-1)) for seen, size in ((queries, n), (keys, m))
    )
    return next(counts), next(counts)


def visible_keys_of(call: "Call", pattern: "Pattern", n: int, m: int, device: torch.device) -> Int[Tensor, "#b #h n"]:
    """Count the keys that each query sees."""
    if call.pairs is not None:
        visible = visible_pairs(call, pattern, n, m, device)
        assert visible is not None
        return visible.sum(-1).expand(-1, -1, n)
    if _sees_past_only(pattern, n, m):
        total = torch.arange(m - n + 1, m + 1, device=device)[None]
        if call.keys is not None:
            total = call.keys.cumsum(-1)[:, m - n :]
    else:
        total = torch.full((1, 1), m, device=device) if call.keys is None else call.keys.sum(-1, keepdim=True)
    if call.queries is not None:
        total = total * call.queries
    return total[:, None].expand(-1, -1, n)


def hide_tokens(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    call: "Call",
    pattern: "Pattern",
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h m d"], Float[Tensor, "b h m dv"]]:
    """Zero the tokens that no pair can see, so that nothing (NaN included) leaks out of padding."""
    queries, keys = seen_tokens(call, pattern, q.shape[2], k.shape[2])
    if queries is not None:
        q = q.masked_fill(~queries[..., None], 0)
    if keys is not None:
        k, v = k.masked_fill(~keys[..., None], 0), v.masked_fill(~keys[..., None], 0)
    return q, k, v


def count_pairs(
    pairs: Bool[Tensor, "#b #h #n m"] | None, shape: tuple[int, int, int, int], device: torch.device
) -> Float[Tensor, "b h"]:
    """Count the pairs of a broadcastable mask for each example and head of `shape` = (b, h, n, m)."""
    b, h, n, m = shape
    if pairs is None:
        return torch.full((b, h), float(n * m), device=device)
    return pairs.expand(-1, -1, n, m).sum((-2, -1)).float().expand(b, h)


def _sees_past_only(pattern: "Pattern", n: int, m: int) -> bool:
    if not pattern.causal or pattern.cross or n == 1:
        return False
    if n > m:
        raise ValueError(f"causal self attention needs at least as many keys as queries, got {n} queries, {m} keys")
    return True
