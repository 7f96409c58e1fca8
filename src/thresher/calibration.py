"""Thresholds from data: the theta at which a head keeps a given share of its visible pairs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from thresher.attention.base import Call, Pattern
from thresher.attention.thresholds import Thresholded


def difference_quantile(
    difference: Float[Tensor, "b h n m"], visible: Bool[Tensor, "#b #h #n m"] | None, kept: float
) -> Float[Tensor, " h"]:
    """Return, for each head, the difference below or at which a share `kept` of the visible pairs lies.

    A head without a visible pair yields nan.
    """
    b, h, n, m = difference.shape
    flat = difference.transpose(0, 1).reshape(h, -1)
    if visible is None:
        k = min(max(round(kept * flat.shape[1]), 1), flat.shape[1])
        return flat.kthvalue(k, dim=-1).values.float()
    shown = visible.expand(b, h, n, m).transpose(0, 1).reshape(h, -1)
    ordered = flat.masked_fill(~shown, float("inf")).sort(dim=-1).values
    count = shown.sum(-1)
    rank = (kept * count).round().long().clamp_min(1).minimum(count) - 1
    return ordered.gather(1, rank.clamp_min(0)[:, None])[:, 0].float().masked_fill(count == 0, float("nan"))


def some_queries(
    q: Float[Tensor, "b h n d"], keys: int, call: Call, pattern: Pattern, rows: Tensor
) -> tuple[Float[Tensor, "b h r d"], Call]:
    """Return the queries at `rows`, which ascend, and the call in which each sees what it saw among all `keys`."""
    n = q.shape[2]
    pairs = None if call.pairs is None else call.pairs[:, :, rows]
    if pattern is Pattern.CAUSAL_SELF and n > 1:
        # Fewer queries than keys are taken for the last ones; inside the past of those, each keeps its own.
        past = (torch.arange(keys, device=q.device) <= (rows + (keys - n))[:, None])[None, None]
        pairs = past if pairs is None else pairs & past
    seen = Call(
        queries=None if call.queries is None else call.queries[:, rows],
        keys=call.keys,
        pairs=pairs,
        bias=None if call.bias is None else call.bias[:, :, rows],
    )
    return q[:, :, rows], seen


class ThresholdProbe:
    """Reads, from forward passes of `model`, the quantiles that calibrated thresholds would have.

    Hooks stay registered and do nothing while `level` is None; make the probe before a compiled model first runs.

    Args:
        model: Any model with thresholds inside.
        examples: Number of examples of a batch that are read.
        pairs: Pairs of a head that are read: in longer sequences those of queries drawn at random.

    Attributes:
        level: The share of visible pairs to keep, or None to read nothing.
        thresholds: The thresholds found, by dotted name.

    Raises:
        ValueError: The model has no thresholds.
    """

    def __init__(self, model: nn.Module, examples: int = 16, pairs: int = 2**18) -> None:
        self.level: float | None = None
        self.examples = examples
        self.pairs = pairs
        owners = {name: m for name, m in model.named_modules() if isinstance(m, Thresholded)}
        if not owners:
            raise ValueError(f"{type(model).__name__} has no thresholds to calibrate; sparsify() it with 'latte' first")
        self.thresholds = {f"{name}.thresholds".lstrip("."): m.thresholds for name, m in owners.items()}
        self._read: dict[str, list[Tensor]] = {name: [] for name in self.thresholds}
        self._handles = [
            owner.register_forward_pre_hook(partial(self._see, name))  # type: ignore[attr-defined]
            for name, owner in zip(self.thresholds, owners.values(), strict=True)
        ]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _see(self, name: str, owner: Thresholded, args: tuple[Tensor, Tensor, Tensor, Call]) -> None:
        if self.level is not None:
            q, k, _, call = args
            some = slice(self.examples)
            q, k, call = q[some], k[some], call.examples(some)
            (b, _, n, _), m = q.shape, k.shape[2]
            if b * n * m > self.pairs:
                rows = torch.randperm(n, device=q.device)[: max(self.pairs // (b * m), 1)].sort().values
                q, call = some_queries(q, m, call, owner.pattern, rows)
            difference, visible, always_keep = owner.differences(q, k, call)
            # What is kept anyway counts towards the share, too.
            difference[..., :always_keep] = float("-inf")
            self._read[name].append(difference_quantile(difference, visible, self.level).clamp_min(0))

    @torch.no_grad()
    def collect(self) -> dict[str, Float[Tensor, " h"]]:
        """Return the mean quantiles read since the last call, over all processes; heads that saw nothing are nan."""
        means = {}
        for name, read in self._read.items():
            stacked = torch.stack(read) if read else torch.full_like(self.thresholds[name].base, float("nan"))[None]
            seen = ~stacked.isnan()
            sums = torch.stack([stacked.nan_to_num().sum(0), seen.sum(0).to(stacked.dtype)])
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(sums)
            means[name] = sums[0] / sums[1]
            read.clear()
        return means

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self._handles:
            handle.remove()


def is_noisy(model: nn.Module) -> bool:
    """Say whether the model drops anything in the mode that it is in, by what its modules call dropout or drop path."""
    return any(
        m.training
        and any(
            isinstance(rate, float) and rate > 0
            for name, rate in vars(m).items()
            if "drop" in name or (name == "p" and isinstance(m, _DropoutNd))
        )
        for m in model.modules()
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and afterwards back into its own."""
    training = [m for m in model.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Any], kept: float, forward: Callable[[Any], Any] | None = None
) -> dict[str, Float[Tensor, " h"]]:
    """Set every head's threshold so that it keeps a share `kept` of its visible pairs on these batches.

    They hold in training and in evaluation: where dropout makes the two differ, those of the mode that the model is in.
    Layers are read in one pass, with the thresholds that the model has: for an aggressive `kept` call it
    twice, so that deep layers are read behind sparse ones.

    Args:
        model: A model with thresholds inside, in the mode (train or eval) in which it will be used.
        batches: Model inputs, already on the model's device.
        kept: Share of the visible pairs to keep, in (0, 1].
        forward: How to run the model on a batch; `model(batch)` by default.

    Returns:
        The thresholds set, by dotted name.

    Raises:
        ValueError: `kept` is out of range, there are no batches, or the model has no thresholds.
    """
    if not 0 < kept <= 1:
        raise ValueError(f"kept is a share of the visible pairs and must lie in (0, 1], got {kept}")
    probe = ThresholdProbe(model, examples=2**31, pairs=2**62)
    probe.level = kept
    try:
        run = forward or model
        ran = False
        for batch in batches:
            run(batch)
            ran = True
        if not ran:
            raise ValueError("calibration needs at least one batch, got none")
        found = probe.collect()
    finally:
        probe.remove()
    for name, base in found.items():
        thresholds = probe.thresholds[name]
        thresholds.set_base(base)
        thresholds.offset[~base.isnan()] = 0
    return {name: thresholds.values() for name, thresholds in probe.thresholds.items()}
