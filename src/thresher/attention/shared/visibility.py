"""Visibility of pairs and tokens: padding, causality and pair masks as masks, hidden tokens and counts.

Masks are boolean; True means visible, and None means all visible, which costs nothing to apply. Only `build_pair_mask`
builds a mask of pairs, for the requested rows. All other functions take time and memory linear in the number of tokens,
unless the call itself has a mask of pairs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from thresher.attention.contract import Call, Pattern


def has_no_pairs(q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk m d"]) -> bool:
    """Check whether there is no pair at all: no example, no query or no key."""
    return 0 in (q.shape[0], q.shape[2], k.shape[2])


def build_pair_mask(
    call: Call, pattern: Pattern, n: int, m: int, device: torch.device, rows: range | None = None
) -> Bool[Tensor, "#b #h #n m"] | None:
    """Combine causality, padding and `call.pairs` into one broadcastable mask; None if all pairs are visible.

    With fewer queries than keys a causal mask is aligned to the lower right: the queries are the last tokens. With
    `Call.whole_mask`, `call.pairs` already contains causality.

    Args:
        call: Masks of the call.
        pattern: Pattern of the attention.
        n: Number of queries.
        m: Number of keys.
        device: Device of the mask.
        rows: Consecutive queries to build the mask for; all by default.

    Raises:
        ValueError: Causal self attention with more queries than keys.
    """
    rows = range(n) if rows is None else rows
    chosen = slice(rows.start, rows.stop)
    visible: Tensor | None = None
    if hides_later_keys(call, pattern, n, m):
        visible = torch.ones(len(rows), m, dtype=torch.bool, device=device).tril(m - n + rows.start)[None, None]
    for part in (
        None if call.keys is None else call.keys[:, None, None, :],
        None if call.queries is None else call.queries[:, None, chosen, None].expand(-1, -1, -1, m),
        None if call.pairs is None else call.pairs[:, :, chosen],
    ):
        if part is not None:
            visible = part if visible is None else visible & part
    return visible


def find_seen_tokens(
    call: Call, pattern: Pattern, n: int, m: int, visible: Bool[Tensor, "#b #h #n m"] | None = None
) -> tuple[Bool[Tensor, "#b #h n"] | None, Bool[Tensor, "#b #h m"] | None]:
    """Find the queries that see any key and the keys that any query sees; None means all.

    Args:
        call: Masks of the call.
        pattern: Pattern of the attention.
        n: Number of queries.
        m: Number of keys.
        visible: The result of `build_pair_mask` for this call, if known.
    """
    if call.pairs is not None:
        visible = build_pair_mask(call, pattern, n, m, call.pairs.device) if visible is None else visible
        assert visible is not None
        return visible.any(-1), visible.any(-2)
    given = call.keys if call.queries is None else call.queries
    if given is None:
        hides_later_keys(call, pattern, n, m)
        return None, None
    queries = given.new_ones(len(given), n) if call.queries is None else call.queries
    keys = given.new_ones(len(given), m) if call.keys is None else call.keys
    if hides_later_keys(call, pattern, n, m):
        some_key = keys.cumsum(-1)[:, m - n :] > 0
        later = queries.flip(-1).cumsum(-1).flip(-1) > 0
        some_query = torch.cat([queries.any(-1, keepdim=True).expand(-1, m - n), later], -1)
    else:
        some_key, some_query = keys.any(-1, keepdim=True), queries.any(-1, keepdim=True)
    return (queries & some_key)[:, None], (keys & some_query)[:, None]


def count_visible_keys(
    call: Call,
    pattern: Pattern,
    n: int,
    m: int,
    device: torch.device,
    visible: Bool[Tensor, "#b #h #n m"] | None = None,
) -> Int[Tensor, "#b #h n"]:
    """Count the keys that each query sees; `visible` is the result of `build_pair_mask`, if known."""
    if call.pairs is not None:
        visible = build_pair_mask(call, pattern, n, m, device) if visible is None else visible
        assert visible is not None
        return visible.sum(-1).expand(-1, -1, n)
    if hides_later_keys(call, pattern, n, m):
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
    queries: Bool[Tensor, "#b #h n"] | None,
    keys: Bool[Tensor, "#b #h m"] | None,
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h m d"], Float[Tensor, "b h m dv"]]:
    """Zero the tokens that `find_seen_tokens` does not find, so that padding leaks nothing, NaN included."""
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


def find_own_slots(call: Call, n: int, m: int, device: torch.device) -> Int[Tensor, "#b n"]:
    """Find the positions of the queries' own keys among the m keys of causal self attention."""
    return torch.arange(m - n, m, device=device)[None] if call.slots is None else call.slots


def take_own_rows(x: Float[Tensor, "b h m d"], call: Call, n: int) -> Float[Tensor, "b h n d"]:
    """Select the rows of the queries' own keys from values or other data of keys."""
    if call.slots is None:
        return x[:, :, x.shape[2] - n :]
    return x.gather(2, call.slots[:, None, :, None].expand(len(x), x.shape[1], n, x.shape[3]))


def refuse_unknown_order(call: Call, pattern: Pattern, n: int, m: int, name: str) -> None:
    """Refuse a whole mask that is not causal, for a mechanism that depends on the order of tokens.

    Raises:
        ValueError: A query sees keys after its own; see `raise_if` for devices other than the CPU.
    """
    if not call.whole_mask or call.pairs is None or pattern.cross or not pattern.causal:
        return
    pairs, own = call.pairs, find_own_slots(call, n, m, call.pairs.device)[:, None, :, None]
    index = torch.arange(m, device=pairs.device)
    wrong = (pairs & (index > own)).any()
    if call.slots is not None:
        # Slots come from the mask: if the key in a query's slot exists but is hidden from it, the slot is wrong.
        some_row = pairs.any(-2, keepdim=True).expand(-1, -1, n, m)
        at = own.expand(*some_row.shape[:2], n, 1)
        missed = ~pairs.expand_as(some_row).gather(-1, at) & some_row.gather(-1, at) & pairs.any(-1, keepdim=True)
        wrong = wrong | missed.any()
    raise_if(
        wrong,
        f"{name} takes causal self attention in the order of tokens, and this mask shows keys after the query's own; "
        "hide rows of padding instead of opening them, or choose a mechanism that follows any mask (dense, latte, "
        "topk, yoso, mean)",
    )


def can_read_values(x: Shaped[Tensor, "..."]) -> bool:
    """Check whether code may branch on values of `x`: on a CPU outside compiled code, where nothing has to wait."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


_waits = False


@contextmanager
def wait_for_checks() -> Iterator[None]:
    """Let checks wait for the device and raise ValueError, for trial runs of a mechanism."""
    global _waits
    before, _waits = _waits, True
    try:
        yield
    finally:
        _waits = before


def raise_if(wrong: Bool[Tensor, ""], message: str) -> None:
    """Raise an error if a flag is set, without waiting for a device, except inside `wait_for_checks`.

    Raises:
        ValueError: The flag is set, on a CPU. Compiled code raises RuntimeError instead; on CUDA a device assert prints
            the message and ends the process.
    """
    if not _waits and not can_read_values(wrong):
        torch._assert_async(~wrong, message)
    elif wrong:
        raise ValueError(message)


def hides_later_keys(call: Call, pattern: Pattern, n: int, m: int) -> bool:
    """Check whether causality hides the keys after a query's own.

    Raises:
        ValueError: Causal self attention has more queries than keys.
    """
    if not pattern.causal or pattern.cross or n == 1 or (call.whole_mask and call.pairs is not None):
        return False
    if n > m:
        raise ValueError(f"causal self attention needs at least as many keys as queries, got {n} queries, {m} keys")
    return True
