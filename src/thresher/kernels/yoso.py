"""YOSO's operators on CPUs: codes from projections, sums over colliding tokens, gradients to queries and keys."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thresher.kernels.calling import call

Codes = Int[Tensor, "m g n"]
ALL, PAST, LATER = range(3)  # which senders a receiver reads


@torch.library.custom_op("thresher::yoso_pack", mutates_args=())
def pack(y: Tensor, bits: int) -> Tensor:
    """Return codes int16 [m, n] of the signs of y [n, m * bits], the first bit of a code the lowest."""
    y = y.contiguous()
    tokens, width = y.shape
    codes = y.new_empty(width // bits, tokens, dtype=torch.int16)
    call("yoso", "pack", y.dtype, y, codes, tokens, width // bits, bits)
    return codes


@pack.register_fake
def _(y: Tensor, bits: int) -> Tensor:
    return y.new_empty(y.shape[1] // bits, y.shape[0], dtype=torch.int16)


@torch.library.custom_op("thresher::yoso_sums", mutates_args=())
def sums(
    receivers: Tensor, senders: Tensor, seen: Tensor | None, x: Tensor, slots: int, order: int, shift: int
) -> tuple[Tensor, Tensor]:
    """Sum, over all hashes, the rows of x whose code a receiver shares, and count them.

    Args:
        receivers: Codes of those who read, int16 [m, g, n].
        senders: Codes of those who write, int16 [m, g, k].
        seen: Senders that write, bool [g, k]; None is all.
        x: What is written, [g, k, c].
        slots: Number of different codes.
        order: ALL; PAST, a receiver i reads senders j <= i + shift; or LATER, senders j >= i - shift.
        shift: How far receivers lie ahead.

    Returns:
        The sums [g, n, c], and the number of rows that entered each, [g, n].
    """
    receivers, senders, x = receivers.contiguous(), senders.contiguous(), x.contiguous()
    (m, g, n), k, c = receivers.shape, senders.shape[2], x.shape[2]
    out, met = x.new_empty(g, n, c), x.new_empty(g, n)
    seen = None if seen is None else seen.contiguous()
    call("yoso", "sums", x.dtype, receivers, senders, seen, x, out, met, g, n, k, c, m, slots, order, shift)
    return out, met


@sums.register_fake
def _(
    receivers: Tensor, senders: Tensor, seen: Tensor | None, x: Tensor, slots: int, order: int, shift: int
) -> tuple[Tensor, Tensor]:
    (_, g, n), c = receivers.shape, x.shape[2]
    return x.new_empty(g, n, c), x.new_empty(g, n)


@torch.library.custom_op("thresher::yoso_bound", mutates_args=())
def bound(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    codes_q: Tensor,
    codes_k: Tensor,
    seen: Tensor | None,
    slots: int,
    shift: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return scale * sum of (grad_i . v_j) k_j over the keys that collide with query i, and likewise for keys.

    Each hash in which a pair collides counts. A bucket of few tokens is worked off pair by pair, a full one through
    the sum of v_j k_j^T: time is linear in the number of tokens, whatever their codes.

    Args:
        q: Queries [g, n, d].
        k: Keys [g, m, d].
        v: Values [g, m, dv].
        grad: Gradient of the sums [g, n, dv].
        codes_q: Codes of queries, int16 [hashes, g, n].
        codes_k: Codes of keys, int16 [hashes, g, m].
        seen: Keys that count, bool [g, m]; None is all.
        slots: Number of different codes.
        shift: Where causal, query i sees keys j <= i + shift.
        scale: What results are multiplied by.
    """
    q, k, v, grad, codes_q, codes_k = (x.contiguous() for x in (q, k, v, grad, codes_q, codes_k))
    seen = None if seen is None else seen.contiguous()
    into_q, into_k = torch.empty_like(q), torch.empty_like(k)
    sizes = len(q), q.shape[1], k.shape[1], q.shape[2], v.shape[2], len(codes_q), slots
    past = int(shift is not None), shift or 0
    call("yoso", "bound", q.dtype, q, k, v, grad, codes_q, codes_k, seen, into_q, into_k, *sizes, *past, float(scale))
    return into_q, into_k


@bound.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    codes_q: Tensor,
    codes_k: Tensor,
    seen: Tensor | None,
    slots: int,
    shift: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def sums_of_keys(
    x: Float[Tensor, "g m c"],
    codes_q: Codes,
    codes_k: Codes,
    seen: Bool[Tensor, "g m"] | None,
    slots: int,
    shift: int | None,
) -> tuple[Float[Tensor, "g n c"], Float[Tensor, "g n"]]:
    """Sum what keys write where queries read, and count the keys; with a shift, those up to the query."""
    result: tuple[Tensor, Tensor] = sums(codes_q, codes_k, seen, x, slots, ALL if shift is None else PAST, shift or 0)
    return result


def sums_of_queries(
    x: Float[Tensor, "g n c"], codes_q: Codes, codes_k: Codes, slots: int, shift: int | None
) -> Float[Tensor, "g m c"]:
    """Sum what queries write where keys read, the adjoint of `sums_of_keys`."""
    total: Tensor = sums(codes_k, codes_q, None, x, slots, ALL if shift is None else LATER, shift or 0)[0]
    return total
