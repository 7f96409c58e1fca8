"""Allocate a budget of pairs to heads by sensitivity: what the output loses if one head alone keeps a share r.

For each head h and share r, with O_h the head's dense output, dO_h(r) its change under sparse attention, and g_h the
gradient of a random projection of the network's output,

    E_h(r) = E[ sum over rows of (g_h . dO_h(r))^2 ]

estimates the error of the output to second order (Gauss-Newton), rows and heads taken to be independent. Projections
are drawn such that E is the error of `objectives.measure_error`. The greedy allocation raises, step by step, the share
of the head that gains most for each further pair; on convex curves that is optimal. It needs a few backwards and
forwards of each mechanism for a batch, and no training.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thresher.attention.contract import Attended, Call
from thresher.attention.mechanism import Mechanism, dense_attention
from thresher.attention.shared.offsets import HeadOffsets, named_offsets
from thresher.attention.shared.thresholds import Thresholds
from thresher.attention.topk import TopK
from thresher.budget.calibration import calibrate, compute_quantiles, evaluation_mode, run_model
from thresher.budget.meter import ComputeMeter
from thresher.budget.objectives import Objective, project

LEVELS = (0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.22, 0.33, 0.5, 0.7, 1.0)
PROJECTIONS = 4  # of the output of each batch


@dataclass(frozen=True)
class Allocation:
    """Shares of heads, and what they are predicted to gain.

    Attributes:
        shares: The share of its visible pairs that each head is to keep, by the dotted name of its mechanism.
        uniform_error: Predicted error if each head keeps the same share.
        error: Predicted error with these shares.
        gain: Share of the uniform error that allocation takes away, found on one half of the batches and measured on
            the other: what an allocation can be expected to gain on new data.
        uncertainty: Half the distance of the two halves' gains. Where `gain` is no larger, allocation cannot pay here.
    """

    shares: dict[str, Float[Tensor, " h"]]
    uniform_error: float
    error: float
    gain: float
    uncertainty: float

    def __str__(self) -> str:
        verdict = "" if self.gain > self.uncertainty else ": allocation cannot pay here"
        return f"headroom of allocation: {self.gain:.0%} of the error, give or take {self.uncertainty:.0%}{verdict}"


def allocate(
    model: nn.Module,
    batches: Iterable[Any],
    kept: float,
    *,
    forward: Callable[[Any], Any] | None = None,
    objective: Objective = "auto",
) -> Allocation:
    """Measure how sensitive the output is to each head, and allocate a budget of pairs greedily.

    The model does not change; `apply_shares(model, batches, allocation.shares)` makes its heads keep these shares.

    Args:
        model: A model with thresholds, or with factors of numbers of keys, inside.
        batches: Model inputs on the model's device, at least two.
        kept: Share of all visible pairs to keep, at least 0.01 and below 1.
        forward: How to run the model on a batch; by default `model(**batch)` for mappings, else `model(batch)`.
        objective: The error to keep low: "error", "kl" or "auto", see `tune`.

    Raises:
        ValueError: There are fewer than two batches, `kept` is out of range, or the model has nothing to allocate.
    """
    if not LEVELS[0] <= kept < 1:
        raise ValueError(f"kept is a share of the visible pairs between {LEVELS[0]} and 1, got {kept}")
    owners: dict[str, Any] = {name: model.get_submodule(name) for name, _ in named_offsets(model)}
    if not owners:
        raise ValueError(f"{type(model).__name__} has no thresholds to allocate a budget to; sparsify() it first")
    run = forward or partial(run_model, model)
    generator = torch.Generator().manual_seed(0)
    with evaluation_mode(model):
        measured = [_measure_errors(owners, run, batch, objective, generator) for batch in batches]
    if len(measured) < 2:
        raise ValueError("an allocation needs at least two batches, to say what it gains on others")
    errors, pairs = (torch.stack(parts) for parts in zip(*measured, strict=True))  # [batches, heads, levels or none]
    whole, pairs = errors.mean(0), pairs.sum(0)
    shares, uniform = allocate_greedily(whole, kept, pairs), torch.full((len(whole),), kept)
    halves = [errors[start::2].mean(0) for start in (0, 1)]
    gains = [
        1 - predict_error(other, allocate_greedily(own, kept, pairs)) / max(predict_error(other, uniform), 1e-30)
        for own, other in itertools.permutations(halves)
    ]
    heads = [owner.num_heads for owner in owners.values()]
    return Allocation(
        shares=dict(zip(owners, shares.split(heads), strict=True)),
        uniform_error=predict_error(whole, uniform),
        error=predict_error(whole, shares),
        gain=sum(gains) / 2,
        uncertainty=abs(gains[0] - gains[1]) / 2,
    )


@torch.no_grad()
def apply_shares(
    model: nn.Module,
    batches: Sequence[Any],
    shares: Mapping[str, Float[Tensor, " h"]],
    forward: Callable[[Any], Any] | None = None,
) -> None:
    """Set thresholds, or factors of numbers of keys, so that each head keeps its share of the visible pairs.

    Args:
        model: A model with thresholds or factors inside.
        batches: Model inputs to read thresholds from.
        shares: By the dotted name of the mechanism, as `allocate` finds them.
        forward: See `allocate`.
    """
    run = forward or partial(run_model, model)
    offsets = dict(named_offsets(model))
    thresholds = {name: shares[name] for name, each in offsets.items() if isinstance(each, Thresholds)}
    for _ in range(2 if thresholds else 0):  # deep layers are read behind sparse ones
        calibrate(model, batches, thresholds, forward=run)
    factors = {name: each for name, each in offsets.items() if name not in thresholds}
    if factors:
        for each in factors.values():
            each.offset.zero_()
        meter, costs = ComputeMeter(model), []
        for batch in batches:
            with meter:
                run(batch)
            costs += meter.calls
        for name, each in factors.items():
            counts = [torch.stack([cost.kept.sum(0), cost.visible.sum(0)]) for owner, cost in costs if owner == name]
            kept, visible = sum(counts, torch.zeros(2, len(each.offset), device=each.offset.device))
            offset = (shares[name].to(kept) * visible / kept.clamp_min(1)).log()
            each.offset.copy_(torch.where(visible > 0, offset, 0.0))  # one that saw no pair stays as it is


def allocate_greedily(
    errors: Float[Tensor, "h levels"], kept: float, pairs: Float[Tensor, " h"] | None = None
) -> Float[Tensor, " h"]:
    """Allocate a share `kept` of all pairs to heads whose errors at `LEVELS` are known.

    Errors are replaced by their convex hull from below, along which each further pair gains less.

    Args:
        errors: Of each head at each level.
        kept: Share of all pairs.
        pairs: Number of visible pairs of each head; None is the same for all.
    """
    numbers = torch.ones(len(errors)) if pairs is None else pairs / pairs.mean().clamp_min(1e-30)
    steps = []  # (gain for a pair, head, from, to)
    for head, (curve, number) in enumerate(zip(errors.tolist(), numbers.tolist(), strict=True)):
        hull = _find_hull(list(zip(LEVELS, curve, strict=True))) if number else []
        steps += [((a[1] - b[1]) / (b[0] - a[0]) / number, head, a[0], b[0]) for a, b in itertools.pairwise(hull)]
    shares = torch.full((len(errors),), LEVELS[0], dtype=torch.float64)
    left = (kept - LEVELS[0]) * float(numbers.sum())
    for _, head, before, after in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        share = min(after - before, left / float(numbers[head]))
        shares[head] += share
        left -= share * float(numbers[head])
        if left <= 0:
            break
    return shares.to(errors.dtype)


def _find_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Find the corners of the convex hull below points of ascending x."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull


def predict_error(errors: Float[Tensor, "h levels"], shares: Float[Tensor, " h"]) -> float:
    """Predict the error of shares, between two levels by a straight line."""
    levels = torch.tensor(LEVELS, dtype=errors.dtype)
    after = torch.searchsorted(levels, shares.clamp(LEVELS[0], 1.0).contiguous()).clamp(1, len(LEVELS) - 1)
    low, high = levels[after - 1], levels[after]
    part = ((shares - low) / (high - low)).clamp(0, 1)
    rows = torch.arange(len(errors))
    return float(errors[rows, after - 1].lerp(errors[rows, after], part).sum())


class _Read(NamedTuple):
    """A call of a mechanism, its dense output, and a zero that was added to that output."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    call: Call
    dense: Tensor
    change: Tensor


def _measure_errors(
    owners: Mapping[str, Mechanism],
    run: Callable[[Any], Any],
    batch: Any,
    objective: Objective,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "h levels"], Float[Tensor, " h"]]:
    """Measure the error of each head at each level on one batch, and its number of visible pairs."""
    reads: list[_Read] = []
    pairs = {name: torch.zeros(owner.num_heads) for name, owner in owners.items()}

    def read(name: str, module: nn.Module, args: tuple[Tensor, Tensor, Tensor, Call], attended: Attended) -> Attended:
        q, k, v, call = args
        change = torch.zeros_like(attended.out, requires_grad=True)
        reads.append(_Read(name, q.detach(), k.detach(), v.detach(), call, attended.out.detach(), change))
        pairs[name] += attended.cost.visible.detach().sum(0).cpu()
        return attended._replace(out=attended.out + change)

    handles = [owner.register_forward_hook(partial(read, name)) for name, owner in owners.items()]
    try:
        with torch.enable_grad(), dense_attention():
            output = run(batch)
            projections = [project(output, batch, objective, generator) for _ in range(PROJECTIONS)]
    finally:
        for handle in handles:
            handle.remove()
    if not reads:
        raise ValueError("no mechanism ran in a batch: nothing can be allocated")
    changes = [each.change for each in reads]
    drawn = [
        torch.autograd.grad(each, changes, retain_graph=True, allow_unused=True, materialize_grads=True)
        for each in projections
    ]
    errors = {name: torch.zeros(owner.num_heads, len(LEVELS)) for name, owner in owners.items()}
    with torch.no_grad():
        for each, gradients in zip(reads, zip(*drawn, strict=True), strict=True):
            owner = owners[each.name]
            for i, _ in enumerate(_keep_each_level(owner, each)):
                change = owner(each.q, each.k, each.v, each.call).out - each.dense
                squares = sum((change * gradient).sum(-1).square().sum((0, 2)) for gradient in gradients)
                errors[each.name][:, i] += (torch.as_tensor(squares) / PROJECTIONS).float().cpu()
    return torch.cat(list(errors.values())), torch.cat(list(pairs.values()))


def _keep_each_level(owner: Any, read: _Read) -> Iterator[None]:
    """Let each head of a mechanism keep in turn each level of the visible pairs of a call, except all of them."""
    offsets = next(each for each in owner.modules() if isinstance(each, HeadOffsets))
    before = {name: x.clone() for name, x in offsets.state_dict().items()}
    try:
        if isinstance(offsets, Thresholds):
            offsets.offset.zero_()
            difference, visible, always_keep = owner.measure_differences(read.q, read.k, read.call)
            difference[..., :always_keep] = float("-inf")
            for base in compute_quantiles(difference, visible, torch.tensor(LEVELS[:-1])[None]).clamp_min(0).T:
                yield offsets.set_base(base)
        else:
            whole = _measure_share(owner, read.q, read.k, read.call)
            for level in LEVELS[:-1]:
                offsets.offset.fill_(math.log(level / whole))
                yield
    finally:
        offsets.load_state_dict(before)


def _measure_share(owner: TopK, q: Tensor, k: Tensor, call: Call) -> float:
    """Measure which share of its visible keys a row keeps on average if its factor is 1."""
    if isinstance(owner.keys, float):
        return owner.keys
    visible = float(owner.prepare(q, k, k, call).visible_keys.float().mean())
    return owner.keys / max(visible, 1.0)
