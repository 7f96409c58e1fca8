"""Translate masks of other libraries for a mechanism, without waiting for a GPU."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from thresher.attention.contract import Pattern
from thresher.attention.mechanism import Mechanism
from thresher.attention.shared.visibility import raise_if

# An additive mask hides by a low number, which differs between libraries: -inf, the lowest of its type, -1e9, -1e4 in
# fp16, -100 in shifted windows. A row whose best entry lies below this number sees nothing.
EMPTY = -9e3


class MaskParts(NamedTuple):
    """Parts of a call: visible keys [b, m], visible pairs [#b, #h, n, m], additive bias [#b, #h, n, m]."""

    keys: Tensor | None = None
    pairs: Tensor | None = None
    bias: Tensor | None = None


def read_mask(mask: Tensor | None, b: int, n: int, m: int) -> MaskParts:
    """Read a mask that broadcasts to [b, h, n, m], True or 0 where visible.

    A mask that is the same row for all queries and heads, by shape or by stride, is a mask of keys and stays of linear
    size. Visible entries of an additive mask (see `find_visible`) are a bias.
    """
    if mask is None:
        return MaskParts()
    mask = mask[(None,) * (4 - mask.ndim)]
    by_keys = _is_one_row(mask) and mask.shape[1] == 1 and mask.shape[3] == m
    mask = mask[:, :, :1] if by_keys else mask
    bias = None
    if mask.dtype != torch.bool:
        visible = find_visible(mask)
        bias = mask.masked_fill(~visible, 0).expand(-1, -1, n, m)
        mask = visible
    if by_keys:
        return MaskParts(keys=mask[:, 0, 0].expand(b, m), bias=bias)
    return MaskParts(pairs=mask.expand(-1, -1, n, m), bias=bias)


def find_visible(mask: Tensor) -> Bool[Tensor, "*shape"]:
    """Find the pairs that a mask [..., n, m], boolean or additive, shows.

    An additive mask hides a key whose weight beside the best entry of its row is below the smallest normal number of
    fp32, or of fp64 in a mask of fp64. A row without an entry above `EMPTY` is hidden as a whole.

    Raises:
        ValueError: The mask has whole numbers, which may mean either kind.
    """
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise ValueError(
            f"masks are boolean, True where visible, or floating point and added to scores; this one is {mask.dtype}: "
            "call .bool() on a mask of 0 and 1"
        )
    least = torch.finfo(torch.float64 if mask.dtype == torch.float64 else torch.float32).tiny
    best = mask.detach().amax(-1, keepdim=True)
    return ~(mask.detach() - best.masked_fill(best < EMPTY, 0) < math.log(least))


def find_visible_queries(mechanism: Mechanism, keys: Tensor | None, n: int) -> Tensor | None:
    """Find the visible queries from a mask [b, m] of keys; None if all are.

    Rows of padding are computed and mean nothing, except that mechanisms which rank queries must not see them.
    """
    own = keys is not None and keys.shape[1] == n and not mechanism.pattern.cross
    return keys if own and mechanism.ranks_queries else None


def check_mask_pattern(mechanism: Mechanism, mask: Tensor, n: int, m: int) -> None:
    """Refuse a mask [.., n, m] that contradicts the pattern of the mechanism.

    Causal self attention takes any mask of pairs as it is, but one row that is the same for all queries is not causal.
    Where nothing is causal, a mask of pairs may be, and mechanisms that pool tokens would let the future through.

    Raises:
        ValueError: It says something else; see `raise_if` for other devices than the CPU.
    """
    pattern = mechanism.pattern
    if pattern.cross or n == 1:
        return
    where = pattern.name.lower()
    mask = mask[(None,) * (4 - mask.ndim)]
    if _is_one_row(mask):
        if pattern.causal:
            raise ValueError(f"this attention was mounted as {where} and is called with a mask that is not causal")
    elif not pattern.causal and mechanism.pools_tokens:
        raise_if(
            hides_future(mask.expand(-1, -1, n, m)),
            f"this attention was mounted as {where} and is called with a causal mask; give such example_inputs",
        )


def hides_future(mask: Tensor) -> Bool[Tensor, ""]:
    """Tell whether a mask [.., n, m], boolean or additive, is causal in some example, as a prefix mask is.

    It is where tokens see the one before them that does not see them, more than once, and none sees a later token that
    does not see it. Once may be an accident: the first token of padding, or a last token that nobody sees. A row that
    sees all says nothing of the tokens in it: it is the last one, or one of padding that was opened against NaN.
    """
    n, m = mask.shape[-2:]
    if n != m or n < 2:
        return torch.zeros((), dtype=torch.bool, device=mask.device)
    visible = find_visible(mask)
    if n == 2:
        return (visible[..., 1, 0] & ~visible[..., 0, 1]).any()
    real = (visible & ~visible.all(-1, keepdim=True)).any(-2) & visible.any(-1)
    one_way = visible & ~visible.mT & real[..., :, None] & real[..., None, :]
    steps, enough = one_way.diagonal(-1, -2, -1).sum(-1), (real.sum(-1) - 1).clamp(1, 2)
    return ((steps >= enough) & ~one_way.triu(1).any(-1).any(-1)).any()


def find_order(masked: MaskParts, pattern: Pattern, n: int, m: int) -> dict[str, Any]:
    """Find the order of tokens that the masks of a call imply, as arguments of `Call`.

    In causal self attention a mask of pairs replaces the causality of the pattern. A cache may have free slots, which
    masks hide: the queries' own keys are consecutive, and the last key that the last query sees is its own.
    """
    if pattern is not Pattern.CAUSAL_SELF or (masked.pairs is None and (masked.keys is None or n > 1)):
        return {}
    order: dict[str, Any] = {"whole_mask": masked.pairs is not None}
    if n < m:
        visible = masked.keys[:, None] if masked.pairs is None else masked.pairs.any(1)  # type: ignore[index]
        row = torch.arange(n, device=visible.device)
        last = m - 1 - visible.flip(-1).int().argmax(-1)
        first = (last - row).masked_fill(~visible.any(-1), 0).amax(-1, keepdim=True)
        order["slots"] = (first + row).clamp_max(m - 1)
    return order


def add_biases(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Add two biases, either of which may be missing."""
    if one is None or other is None:
        return one if other is None else other
    return one + other


def rescale(q: Tensor, scale: float | None) -> Tensor:
    """Rescale queries if the host wants another scale than D^-0.5, which mechanisms apply."""
    size = q.shape[-1] ** 0.5
    return q if scale is None or abs(scale * size - 1) < 1e-9 else q * (scale * size)


def _is_one_row(mask: Tensor) -> bool:
    return mask.shape[2] == 1 or mask.stride(2) == 0
