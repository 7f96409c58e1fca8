"""Select the keys of a row: count them, find the largest scores, scatter kept entries to their keys."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def check_keys(keys: int | float) -> None:
    """Raise ValueError unless `keys` is a number of keys or a share of them."""
    whole = isinstance(keys, int) and not isinstance(keys, bool) and keys >= 1
    if not whole and not (isinstance(keys, float) and 0 < keys <= 1):
        raise ValueError(f"keys must be a number of keys >= 1 or a share in (0, 1], got {keys!r}")


def count_kept_keys(keys: int | float, m: int) -> int:
    """Count how many of m visible keys a row keeps."""
    return min(keys, m) if isinstance(keys, int) else min(max(math.floor(keys * m + 1e-9), 1), m)


def tabulate_kept_keys(keys: int | float, m: int, device: torch.device) -> Int[Tensor, " visible"]:
    """Tabulate how many of 0, 1, ..., m visible keys a row keeps."""
    visible = torch.arange(m + 1, dtype=torch.float64)
    wanted = torch.full_like(visible, float(keys)) if isinstance(keys, int) else (visible * keys + 1e-9).floor()
    return wanted.clamp_min(1).minimum(visible).long().to(device, non_blocking=True)


def count_kept_by_head(
    keys: int | float, factors: Float[Tensor, " h"], visible: Int[Tensor, "#b #h n"]
) -> Int[Tensor, "b h n"]:
    """Count how many of its visible keys each row keeps where `keys` is multiplied by a factor of its head."""
    wanted = factors.detach().double()[:, None] * keys
    wanted = wanted.expand(*visible.shape[:1], -1, visible.shape[2])
    if isinstance(keys, float):
        wanted = wanted * visible
    return (wanted + 1e-9).floor().clamp_min(1).minimum(visible.double()).long()


def find_largest(scores: Float[Tensor, "*rows m"], k: int) -> Int[Tensor, "*rows k"]:
    """Find the indices of the k largest scores in descending order; equal scores rank by lower index.

    NaN ranks first, so the selection does not hide it.
    """
    if scores.dtype == torch.float64 or torch.compiler.is_exporting():  # ONNX cannot read the bits of a float
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    # The bits of floats, read as integers, sort like the floats, except for the signs of zero and NaN.
    bits = (scores + 0.0).masked_fill(scores.isnan(), float("nan")).view(torch.int32)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    index = torch.arange(scores.shape[-1], device=scores.device)
    return ((order.long() << 32) | (0xFFFFFFFF - index)).topk(k, dim=-1).indices


def scatter_entries(x: Tensor, index: Tensor, m: int) -> Tensor:
    """Scatter k entries a row to their indices among m; the indices of a row must differ."""
    return x.new_zeros(*x.shape[:-1], m).scatter_(-1, index, x)
