"""The operators of YOSO on CPUs: codes of projections, sums over colliding tokens, gradients to queries and keys."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thresher.kernels.calling import call

ALL, PAST, LATER = range(3)  # which senders a receiver reads


@torch.library.custom_op("thresher::yoso_pack", mutates_args=())
def pack(y: Tensor, bits: int) -> Tensor:
    """Pack the signs of y [n, hashes * bits] into codes, int16 [hashes, n], lowest bit first."""
    y = y.contiguous()
    tokens, width = y.shape
    codes = y.new_empty(width // bits, tokens, dtype=torch.int16)
    call("yoso", "pack", y.dtype, projections=y, codes=codes, tokens=tokens, hashes=width // bits, bits=bits)
    return codes


@pack.register_fake
def _(y: Tensor, bits: int) -> Tensor:
    return y.new_empty(y.shape[1] // bits, y.shape[0], dtype=torch.int16)


@torch.library.custom_op("thresher::yoso_sums", mutates_args=())
def sum_collisions(
    receivers: Tensor, senders: Tensor, seen: Tensor | None, x: Tensor, slots: int, order: int, shift: int
) -> tuple[Tensor, Tensor]:
    """Sum, over all hashes, the rows of x whose code equals that of a receiver, and count them.

    Args:
        receivers: Codes of the tokens that read, int16 [hashes, g, n].
        senders: Codes of the tokens that write, int16 [hashes, g, k].
        seen: Senders that write, bool [g, k]; None means all.
        x: Rows that senders write, [g, k, c].
        slots: Number of different codes.
        order: ALL; PAST, a receiver i reads senders j <= i + shift; or LATER, senders j >= i - shift.
        shift: Offset of receivers.

    Returns:
        The sums [g, n, c] and the number of rows in each, [g, n].
    """
    receivers, senders, x = receivers.contiguous(), senders.contiguous(), x.contiguous()
    (hashes, g, n), k, c = receivers.shape, senders.shape[2], x.shape[2]
    out, collisions = x.new_empty(g, n, c), x.new_empty(g, n)
    call(
        "yoso",
        "sums",
        x.dtype,
        receiver_codes=receivers,
        sender_codes=senders,
        seen=None if seen is None else seen.contiguous(),
        sent=x,
        sums=out,
        counts=collisions,
        groups=g,
        receivers=n,
        senders=k,
        channels=c,
        hashes=hashes,
        slots=slots,
        order=order,
        shift=shift,
    )
    return out, collisions


@sum_collisions.register_fake
def _(
    receivers: Tensor, senders: Tensor, seen: Tensor | None, x: Tensor, slots: int, order: int, shift: int
) -> tuple[Tensor, Tensor]:
    (_, g, n), c = receivers.shape, x.shape[2]
    return x.new_empty(g, n, c), x.new_empty(g, n)


@torch.library.custom_op("thresher::yoso_bound", mutates_args=())
def compute_bound(
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
    """Compute scale * sum of (grad_i . v_j) k_j over the keys that collide with query i, and likewise for keys.

    A pair counts once for each hash in which it collides. A small bucket is computed pair by pair, a large one from
    the sum of v_j k_j^T, so time is linear in the number of tokens for any codes.

    Args:
        q: Queries [g, n, d].
        k: Keys [g, m, d].
        v: Values [g, m, dv].
        grad: Gradient of the sums [g, n, dv].
        codes_q: Codes of queries, int16 [hashes, g, n].
        codes_k: Codes of keys, int16 [hashes, g, m].
        seen: Keys that count, bool [g, m]; None means all.
        slots: Number of different codes.
        shift: Query i sees keys j <= i + shift; None without causality.
        scale: Factor of the results.
    """
    (g, n, d), m, dv = q.shape, k.shape[1], v.shape[2]
    grad_q, grad_k = q.new_empty(q.shape), k.new_empty(k.shape)
    call(
        "yoso",
        "bound",
        q.dtype,
        queries=q.contiguous(),
        keys=k.contiguous(),
        values=v.contiguous(),
        grad=grad.contiguous(),
        q_codes=codes_q.contiguous(),
        k_codes=codes_k.contiguous(),
        seen=None if seen is None else seen.contiguous(),
        groups=g,
        n=n,
        m=m,
        d=d,
        dv=dv,
        hashes=len(codes_q),
        slots=slots,
        causal=shift is not None,
        shift=shift or 0,
        scale=scale,
        grad_queries=grad_q,
        grad_keys=grad_k,
    )
    return grad_q, grad_k


@compute_bound.register_fake
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


def sum_keys(
    x: Float[Tensor, "g m c"],
    codes_q: Int[Tensor, "hashes g n"],
    codes_k: Int[Tensor, "hashes g m"],
    seen: Bool[Tensor, "g m"] | None,
    slots: int,
    shift: int | None,
) -> tuple[Float[Tensor, "g n c"], Float[Tensor, "g n"]]:
    """Sum the keys that collide with each query and count them; with a shift, keys up to the query only."""
    order = ALL if shift is None else PAST
    result: tuple[Tensor, Tensor] = sum_collisions(
        receivers=codes_q, senders=codes_k, seen=seen, x=x, slots=slots, order=order, shift=shift or 0
    )
    return result


def sum_queries(
    x: Float[Tensor, "g n c"],
    codes_q: Int[Tensor, "hashes g n"],
    codes_k: Int[Tensor, "hashes g m"],
    slots: int,
    shift: int | None,
) -> Float[Tensor, "g m c"]:
    """Sum the queries that collide with each key, the adjoint of `sum_keys`."""
    order = ALL if shift is None else LATER
    total: Tensor
    total, _ = sum_collisions(
        receivers=codes_k, senders=codes_q, seen=None, x=x, slots=slots, order=order, shift=shift or 0
    )
    return total
