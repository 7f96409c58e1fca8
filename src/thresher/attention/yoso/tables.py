"""Sums over colliding tokens through hash tables: linear in the number of tokens, one hash in memory at a time.

Receivers have codes f and senders have codes g. To compute sum_h sum_j [f_h(i) = g_h(j)] x_j, write every x_j into the
slot of its code and read the slot of every f_h(i). In the causal variant a receiver reads only senders before it:
senders enter in blocks, and pairs inside a block are compared directly. Nothing is subtracted, so later tokens leave no
rounding error in earlier rows.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def sum_collisions(
    receivers: Int[Tensor, "m g n"], senders: Int[Tensor, "m g k"], x: Float[Tensor, "g k c"], slots: int
) -> Float[Tensor, "g n c"]:
    """Sum, over all hashes, the rows of x whose code equals that of a receiver."""
    (g, _, c), n = x.shape, receivers.shape[-1]
    first = torch.arange(g, device=x.device)[:, None] * slots
    rows = x.reshape(-1, c)
    out = x.new_zeros(g * n, c)
    for read, write in zip(receivers, senders, strict=True):
        table = x.new_zeros(g * slots, c).index_add_(0, (write + first).flatten(), rows)
        out += table.index_select(0, (read + first).flatten())
    return out.view(g, n, c)


def sum_causal_collisions(
    receivers: Int[Tensor, "m g n"],
    senders: Int[Tensor, "m g k"],
    x: Float[Tensor, "g k c"],
    slots: int,
    shift: int,
    block: int,
) -> Float[Tensor, "g n c"]:
    """Sum as `sum_collisions` does, but let receiver i read only senders j with j <= i + shift.

    Args:
        receivers: Codes of the tokens that read.
        senders: Codes of the tokens that write.
        x: Rows that senders write.
        slots: Number of different codes.
        shift: Offset of receivers; k - n if n receivers and k senders end at the same token.
        block: Number of senders that are compared pair by pair before they enter the table.
    """
    (g, k, c), n = x.shape, receivers.shape[-1]
    first = torch.arange(g, device=x.device)[:, None] * slots
    out = x.new_zeros(g, n, c)
    blocks = [(start, min(start + block, k)) for start in range(0, k, block)]
    ranges = [(max(start - shift, 0), min(max(stop - shift, 0), n)) for start, stop in blocks]
    for read, write in zip(receivers, senders, strict=True):
        table = x.new_zeros(g * slots, c)
        for (start, stop), (low, high) in zip(blocks, ranges, strict=True):
            if high > low and start:
                out[:, low:high] += table.index_select(0, (read[:, low:high] + first).flatten()).view(g, -1, c)
            table.index_add_(0, (write[:, start:stop] + first).flatten(), x[:, start:stop].reshape(-1, c))
        if n > k - shift:
            out[:, k - shift :] += table.index_select(0, (read[:, k - shift :] + first).flatten()).view(g, -1, c)
    for (start, stop), (low, high) in zip(blocks, ranges, strict=True):
        if high > low:
            collisions = count_collisions(receivers[:, :, low:high], senders[:, :, start:stop], x.dtype)
            out[:, low:high] += collisions.tril(low + shift - start) @ x[:, start:stop]
    return out


def count_collisions(receivers: Int[Tensor, "m g n"], senders: Int[Tensor, "m g k"], dtype: torch.dtype) -> Tensor:
    """Count the hashes in which each receiver collides with each sender, [g, n, k]."""
    count = torch.zeros(*receivers.shape[1:], senders.shape[-1], dtype=dtype, device=receivers.device)
    for read, write in zip(receivers, senders, strict=True):
        count += read[:, :, None] == write[:, None, :]
    return count
