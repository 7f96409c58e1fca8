"""Keep divergence visible: a row that reads NaN or infinity is NaN, whatever a mechanism selects or rounds.

A row reads its own query, the keys that it sees, and values: the kept ones in `latte` and `topk`, the visible ones in
other mechanisms. `mean` and `none` have no scores and read values only. Dense attention needs this too: on some
processors PyTorch hides the NaN of a query.

A trace is 0 for finite numbers and NaN otherwise; adding it to an output marks the row. Each number is read once, and
nothing waits for a device. On a CPU, one sum over all numbers shows whether there is anything to trace.
"""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from thresher.attention.contract import Call, Pattern
from thresher.attention.shared import visibility
from thresher.attention.shared.visibility import build_pair_mask, find_seen_tokens


def trace_vectors(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """Compute the trace of each vector: 0 if all its numbers are finite, NaN otherwise."""
    x = x.detach()
    if visibility.can_read_values(x) and bool(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite()):
        return x.new_zeros(x.shape[:-1])
    return (x * 0).sum(-1)


def is_finite(*traces: Shaped[Tensor, "..."] | None) -> bool:
    """Check whether all traces are 0; False where reading them would wait for a device."""
    given = [trace for trace in traces if trace is not None]
    return all(visibility.can_read_values(trace) for trace in given) and not any(
        bool(trace.isnan().any()) for trace in given
    )


def trace_rows(
    queries: Float[Tensor, "b h n"] | None,
    keys: Float[Tensor, "b h m"] | None,
    call: Call,
    pattern: Pattern,
    sizes: tuple[int, int],
) -> Float[Tensor, "b h n 1"] | None:
    """Compute the trace of each row; None if all are 0.

    Args:
        queries: Traces of queries; None if rows do not read them.
        keys: Traces of keys, of values, or their sum, 0 for hidden tokens; None if rows do not read them.
        call: Masks of the call.
        pattern: Pattern of the attention.
        sizes: Numbers of queries and keys.
    """
    n, m = sizes
    given = keys if queries is None else queries
    assert given is not None, "rows read neither queries nor keys"
    if is_finite(queries, keys):
        return None
    rows = given.new_zeros(*given.shape[:2], n) if queries is None else queries
    if keys is not None:
        rows = rows + _trace_visible_keys(keys, call, pattern, n, m)
    shown, _ = find_seen_tokens(call, pattern, n, m)
    return (rows if shown is None else rows.masked_fill(~shown, 0))[..., None]


def trace_kept_keys(keys: Float[Tensor, "b h m"], keep: Bool[Tensor, "#b #h n m"]) -> Float[Tensor, "b h n 1"] | None:
    """Compute the trace of each row over its kept keys; None if all are 0."""
    if is_finite(keys):
        return None
    return _mark_with_nan((keep & keys.isnan()[:, :, None]).any(-1, keepdim=True), keys)


def add_traces(out: Float[Tensor, "b h n dv"], *traces: Float[Tensor, "b h n 1"] | None) -> Float[Tensor, "b h n dv"]:
    """Add the traces of rows to their outputs."""
    for trace in traces:
        out = out if trace is None else out + trace.to(out.dtype)
    return out


def hides_some_pairs(call: Call, pattern: Pattern, n: int) -> bool:
    """Check whether one row may see a key that another does not; zero weights then let NaN through."""
    return call.pairs is not None or (pattern.causal and not pattern.cross and n > 1)


def zero_nonfinite(x: Float[Tensor, "*batch d"], trace: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch d"]:
    """Replace vectors that are not finite by zero."""
    if is_finite(trace):
        return x
    return torch.where(trace.isnan()[..., None], 0, x)


def _trace_visible_keys(keys: Tensor, call: Call, pattern: Pattern, n: int, m: int) -> Shaped[Tensor, "b h #n"]:
    if call.pairs is not None:
        visible = build_pair_mask(call, pattern, n, m, keys.device)
        assert visible is not None
        if visible.shape[1] > 1:
            return _mark_with_nan((visible & keys.isnan()[:, :, None]).any(-1), keys)
        return _mark_with_nan(keys.isnan().to(keys.dtype) @ visible[:, 0].mT.to(keys.dtype) > 0, keys)
    if hides_some_pairs(call, pattern, n):
        # Integer sums: cumulative sums of floats are not deterministic on CUDA.
        return _mark_with_nan(keys.isnan().cumsum(-1)[..., m - n :] > 0, keys)
    return keys.sum(-1, keepdim=True)


def _mark_with_nan(marked: Bool[Tensor, "..."], like: Tensor) -> Tensor:
    return torch.zeros_like(marked, dtype=like.dtype).masked_fill(marked, float("nan"))
