"""Attention of YOSO through tables, with sampled gradients of a lower bound or exact gradients over all pairs."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from thresher.attention.shared.functional import normalize_vectors, normalize_vectors_backward
from thresher.attention.yoso import kernel
from thresher.attention.yoso.hashing import collision_slope
from thresher.attention.yoso.tables import sum_causal_collisions, sum_collisions

Grad = Literal["bound", "exact"]
COLUMNS = 512  # of a table in backward
BLOCK = 256  # tokens compared pair by pair in causal attention, and rows of `grad=exact` in memory at a time


class WithSlopes(torch.autograd.Function):
    """Pair weights whose derivative with respect to the cosine is given."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


class Tables(NamedTuple):
    """How to use tables.

    Attributes:
        slots: Number of different codes.
        grad: Which gradient queries and keys get.
        shift: Query i sees keys j <= i + shift; None without causality.
        by_kernel: Whether the kernel computes the sums.
    """

    slots: int
    grad: Grad
    shift: int | None
    by_kernel: bool


class TableAttention(torch.autograd.Function):
    """Sum colliding values, averaged over hashes, and count collisions; both passes go through tables."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        codes_q: Tensor,
        codes_k: Tensor,
        seen: Tensor | None,
        tables: Tables,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, codes_q, codes_k, seen)
        ctx.tables = tables
        if tables.by_kernel:
            sums, collisions = kernel.sum_keys(v, codes_q, codes_k, seen, tables.slots, tables.shift)
            sums.div_(len(codes_q))
        else:
            real = v.new_ones(v.shape[:2]) if seen is None else seen.to(v.dtype)
            sums = sum_keys(torch.cat([v, real[..., None]], -1), codes_q, codes_k, tables)
            sums, collisions = sums[..., :-1] / len(codes_q), sums[..., -1]
        ctx.mark_non_differentiable(collisions)
        return sums, collisions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        long_q, long_k, v, codes_q, codes_k, seen = ctx.saved_tensors
        q, k, tables, share = normalize_vectors(long_q), normalize_vectors(long_k), ctx.tables, 1 / len(codes_q)
        if tables.by_kernel:
            grad_v = kernel.sum_queries(grad, codes_q, codes_k, tables.slots, tables.shift) * share
        else:
            grad_v = sum_queries(grad, codes_q, codes_k, tables) * share
        if tables.grad == "exact":
            grad_q, grad_k = _compute_exact(q, k, v, grad, tables.slots.bit_length() - 1, tables.shift)
        elif tables.by_kernel:
            slope = share * (tables.slots.bit_length() - 1) / 2
            grad_q, grad_k = kernel.compute_bound(
                q=q,
                k=k,
                v=v,
                grad=grad,
                codes_q=codes_q,
                codes_k=codes_k,
                seen=seen,
                slots=tables.slots,
                shift=tables.shift,
                scale=slope,
            )
        else:
            grad_q, grad_k = compute_bound(q, k, v, grad, codes_q, codes_k, tables)
        grad_q, grad_k = normalize_vectors_backward(long_q, q, grad_q), normalize_vectors_backward(long_k, k, grad_k)
        return grad_q, grad_k, grad_v, None, None, None, None


def compute_bound(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, codes_q: Tensor, codes_k: Tensor, tables: Tables
) -> tuple[Float[Tensor, "g n d"], Float[Tensor, "g m d"]]:
    """Compute the gradients to queries and keys, a few features of the values at a time."""
    grad_q, grad_k = torch.zeros_like(q), torch.zeros_like(k)
    for part in torch.arange(v.shape[-1], device=v.device).split(max(COLUMNS // q.shape[-1], 1)):
        g, u = grad[..., part, None], v[..., part, None]
        from_keys = sum_keys((u * k[..., None, :]).flatten(2), codes_q, codes_k, tables).unflatten(-1, (len(part), -1))
        grad_q += (g * from_keys).sum(-2)
        from_queries = sum_queries((g * q[..., None, :]).flatten(2), codes_q, codes_k, tables)
        grad_k += (u * from_queries.unflatten(-1, (len(part), -1))).sum(-2)
    slope = (tables.slots.bit_length() - 1) / (2 * len(codes_q))
    return grad_q * slope, grad_k * slope


def sum_keys(x: Tensor, codes_q: Tensor, codes_k: Tensor, tables: Tables) -> Tensor:
    """Sum over the keys that collide with a query."""
    if tables.shift is None:
        return sum_collisions(codes_q, codes_k, x, tables.slots)
    return sum_causal_collisions(codes_q, codes_k, x, tables.slots, tables.shift, BLOCK)


def sum_queries(x: Tensor, codes_q: Tensor, codes_k: Tensor, tables: Tables) -> Tensor:
    """Sum over the queries that read a key; in causal attention these come later, so order is reversed."""
    if tables.shift is None:
        return sum_collisions(codes_k, codes_q, x, tables.slots)
    turned = codes_k.flip(-1), codes_q.flip(-1), x.flip(1)
    return sum_causal_collisions(*turned, tables.slots, 0, BLOCK).flip(1)


def _compute_exact(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, bits: int, shift: int | None
) -> tuple[Float[Tensor, "g n d"], Float[Tensor, "g m d"]]:
    grad_q, grad_k = [], torch.zeros_like(k)
    for start in range(0, q.shape[1], BLOCK):
        rows = slice(start, start + BLOCK)
        through = (grad[:, rows] @ v.mT) * collision_slope((q[:, rows] @ k.mT).clamp(-1, 1), bits)
        if shift is not None:
            through = through.tril(start + shift)
        grad_q.append(through @ k)
        grad_k += through.mT @ q[:, rows]
    return torch.cat(grad_q, 1), grad_k
