"""Calibrate thresholds so that each head keeps a given share of its visible pairs in data."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from thresher.attention.contract import Attended, Call, Pattern
from thresher.attention.mechanism import attends_densely
from thresher.attention.shared.thresholds import Thresholded, named_thresholds

_log = logging.getLogger(__name__)


def compute_quantile(
    difference: Float[Tensor, "b h n m"], visible: Bool[Tensor, "#b #h #n m"] | None, kept: float | Float[Tensor, " h"]
) -> Float[Tensor, " h"]:
    """Compute for each head the difference that a share `kept` of the visible pairs does not exceed.

    A head without a visible pair yields nan.
    """
    if visible is None and not isinstance(kept, Tensor):
        flat = difference.transpose(0, 1).flatten(1)
        k = min(max(round(kept * flat.shape[1]), 1), flat.shape[1])
        return flat.kthvalue(k, dim=-1).values.float()
    shares = torch.as_tensor(kept, device=difference.device).expand(difference.shape[1])
    return compute_quantiles(difference, visible, shares[:, None])[:, 0]


def compute_quantiles(
    difference: Float[Tensor, "b h n m"], visible: Bool[Tensor, "#b #h #n m"] | None, kept: Float[Tensor, "#h levels"]
) -> Float[Tensor, "h levels"]:
    """Compute for each head the differences that some shares of the visible pairs do not exceed, from one sort.

    A head without a visible pair yields nan.
    """
    flat = difference.transpose(0, 1).flatten(1)
    if visible is None:
        count = torch.full((len(flat), 1), flat.shape[1], device=flat.device)
    else:
        shown = visible.expand(difference.shape).transpose(0, 1).flatten(1)
        flat, count = flat.masked_fill(~shown, float("inf")), shown.sum(-1, keepdim=True)
    rank = (kept.to(flat.device) * count).round().long().clamp_min(1).minimum(count) - 1
    found = flat.sort(dim=-1).values.gather(1, rank.clamp_min(0).expand(len(flat), -1))
    return found.float().masked_fill(count == 0, float("nan"))


def select_queries(
    q: Float[Tensor, "b h n d"], keys: int, call: Call, pattern: Pattern, rows: Tensor
) -> tuple[Float[Tensor, "b h r d"], Call]:
    """Select the queries at ascending `rows`, and the call in which each sees the same of all `keys`."""
    n = q.shape[2]
    pairs = None if call.pairs is None else call.pairs[:, :, rows]
    slots = None
    if not pattern.cross:
        slots = (rows + (keys - n))[None] if call.slots is None else call.slots[:, rows]
    if pattern is Pattern.CAUSAL_SELF and n > 1 and not (call.whole_mask and call.pairs is not None):
        # Fewer queries than keys count as the last ones; a mask keeps the own past of each.
        past = (torch.arange(keys, device=q.device) <= (rows + (keys - n))[:, None])[None, None]
        pairs = past if pairs is None else pairs & past
    seen = Call(
        queries=None if call.queries is None else call.queries[:, rows],
        keys=call.keys,
        pairs=pairs,
        whole_mask=call.whole_mask,
        slots=slots,
        bias=None if call.bias is None else call.bias[:, :, rows],
    )
    return q[:, :, rows], seen


def draw_rows(n: int, number: int, together: int, device: torch.device) -> Int[Tensor, " rows"]:
    """Draw about `number` of n queries at random, ascending, in whole blocks of those that choose keys together."""
    blocks = torch.randperm(-(-n // together), device=device)[: max(number // together, 1)].sort().values
    return list_rows(blocks, n, together)


def list_rows(blocks: Int[Tensor, " blocks"], n: int, together: int) -> Int[Tensor, " rows"]:
    """List the queries, of n, that lie in some blocks of `together` queries."""
    rows = (blocks[:, None] * together + torch.arange(together, device=blocks.device)).flatten()
    return rows[rows < n]


class ThresholdProbe:
    """Reads the quantiles for calibrated thresholds from forward passes of a model.

    Hooks stay registered and do nothing while `level` is None or attention is dense; build the probe before the first
    run of a compiled model.

    Args:
        model: Any model with thresholds inside.
        examples: Number of examples read of a batch.
        pairs: Number of pairs read of a head; of longer sequences, those of random queries.

    Attributes:
        level: The share of visible pairs to keep, one for all heads or for each by the name of its mechanism; None
            reads nothing.
        thresholds: The thresholds of the model, by the dotted name of their mechanism.

    Raises:
        ValueError: The model has no thresholds.
    """

    def __init__(self, model: nn.Module, examples: int = 16, pairs: int = 2**18) -> None:
        self.level: float | Mapping[str, Float[Tensor, " h"]] | None = None
        self.examples = examples
        self.pairs = pairs
        owners = {name: model.get_submodule(name) for name, _ in named_thresholds(model)}
        if not owners:
            raise ValueError(f"{type(model).__name__} has no thresholds to calibrate; sparsify() it with 'latte' first")
        self.thresholds = dict(named_thresholds(model))
        self.owners = list(owners.values())
        self._read: dict[str, list[Tensor]] = {name: [] for name in self.thresholds}
        self._handles = [
            owner.register_forward_pre_hook(partial(self._read_differences, name)) for name, owner in owners.items()
        ]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _read_differences(self, name: str, owner: Thresholded, args: tuple[Tensor, Tensor, Tensor, Call]) -> None:
        if self.level is not None and not attends_densely():
            q, k, _, call = args
            some = slice(self.examples)
            q, k, call = q[some], k[some], call.examples(some)
            (b, _, n, _), m = q.shape, k.shape[2]
            if b * n * m > self.pairs:
                rows = draw_rows(n, max(self.pairs // (b * m), 1), owner.rows_together, q.device)
                q, call = select_queries(q, m, call, owner.pattern, rows)
            difference, visible, always_keep = owner.measure_differences(q, k, call)
            # Pairs that are always kept count towards the share.
            difference[..., :always_keep] = float("-inf")
            share = self.level[name] if isinstance(self.level, Mapping) else self.level
            self._read[name].append(compute_quantile(difference, visible, share).clamp_min(0))

    @torch.no_grad()
    def collect(self) -> dict[str, Float[Tensor, " h"]]:
        """Average the quantiles read since the last call, over all processes; nan for heads without a visible pair."""
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

    @torch.no_grad()
    def move_bases(self, name: str, share: float) -> None:
        """Move a base of each head by a share of the way towards the quantiles read since the last call.

        Args:
            name: "base", of training, or "eval_base".
            share: 1 is all the way, from infinity, too.
        """
        for owner, quantile in self.collect().items():
            base: Tensor = getattr(self.thresholds[owner], name)
            seen = torch.where(quantile.isfinite(), quantile, base)
            base.copy_(base.lerp(seen, share) if share < 1 else seen)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def run_model(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch; a mapping names the arguments."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def is_noisy(model: nn.Module) -> bool:
    """Tell whether the model drops anything in its current mode, by the dropout and drop-path rates of its modules."""
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
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, then restore its own."""
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
    model: nn.Module,
    batches: Iterable[Any],
    kept: float | Mapping[str, Float[Tensor, " h"]],
    forward: Callable[[Any], Any] | None = None,
    held_out: Iterable[Any] | None = None,
) -> dict[str, Float[Tensor, " h"]]:
    """Set every head's threshold so that it keeps a share `kept` of its visible pairs on these batches.

    They hold in training and in evaluation: where dropout makes the two differ, those of the mode that the model is in.
    Layers are read in one pass, with the thresholds that the model has: for an aggressive `kept` call it
    twice, so that deep layers are read behind sparse ones.

    Args:
        model: A model with thresholds inside, in the mode (train or eval) in which it will be used.
        batches: Model inputs, already on the model's device.
        kept: Share of the visible pairs to keep, in (0, 1]; or the share of each head, by the name of its mechanism, as
            `allocate` finds them.
        forward: How to run the model on a batch; by default `model(**batch)` for mappings, else `model(batch)`.
        held_out: Other inputs. What the thresholds keep of their visible pairs is measured and logged, as a warning
            where it differs from `kept` by more than a tenth.

    Returns:
        The thresholds set, by the dotted name of their mechanism.

    Raises:
        ValueError: `kept` is out of range, there are no batches, or the model has no thresholds.
    """
    shares = torch.cat(list(kept.values())) if isinstance(kept, Mapping) else torch.tensor([kept])
    if not bool(((shares > 0) & (shares <= 1)).all()):
        raise ValueError(f"kept is a share of the visible pairs and must lie in (0, 1], got {kept}")
    probe = ThresholdProbe(model, examples=2**31, pairs=2**62)
    probe.level = kept
    try:
        run = forward or partial(run_model, model)
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
    if held_out is not None:
        _measure_drift(probe, held_out, float(shares.mean()), run)
    return {name: thresholds.values() for name, thresholds in probe.thresholds.items()}


def _measure_drift(probe: ThresholdProbe, batches: Iterable[Any], kept: float, run: Callable[[Any], Any]) -> None:
    sums = torch.zeros(2, dtype=torch.float64)

    def count(module: nn.Module, args: Any, attended: Attended) -> None:
        cost = attended.cost
        sums.add_(torch.stack([cost.kept.sum(), cost.visible.sum()]).detach().to(sums))

    handles = [owner.register_forward_hook(count) for owner in probe.owners]
    try:
        for batch in batches:
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not sums[1]:
        raise ValueError("held_out has no batch with visible pairs: give inputs to measure on, or leave it out")
    found = float(sums[0] / sums[1])
    level = logging.WARNING if abs(found - kept) > 0.1 * kept else logging.INFO
    _log.log(level, "thresholds keep %.3f of the visible pairs of held-out batches, asked for %g", found, kept)
