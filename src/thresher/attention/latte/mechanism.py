"""LATTE: head-wise trainable thresholds on low-precision score estimates (arXiv 2404.07519).

Keeps      key j of row i iff max_j S_ij - S_ij <= theta_h u_i, with S estimated from the top bits of 8-bit codes.
           `unit=nats`, u_i = 1, is the rule of the paper: since P_ij / max_j P_ij = exp(S_ij - max_j S_ij), it keeps
           the keys whose probability is at least exp(-theta_h) of the row's largest. With `unit=spread` u_i is the
           distance from the row's best estimate to its mean, so flat and peaked rows keep about as many keys.
Costs      in 8-bit MACs: D (bits/8)^2 a visible pair for the estimate, and for each kept pair the rest of its score,
           D (1 - (bits/8)^2), and Dv for its value. With 4 bits and D = Dv that is (1 + 7 kept) / 8 of dense. The exact
           score of a kept pair counts as an 8-bit score; `estimate.scoring=int8` computes the latter. Comparisons,
           maxima, means and the softmax are not counted.
Trains     theta, one for each head (see `thresholds.py` for base and offset). `gate.mode=ste` has a hard gate with the
           gradient of a smooth step, `soft` uses a sigmoid in the forward pass of training too, `hard` fixes theta.
Emulates   the pruning accelerator of the paper: this file computes all scores and discards some. Training needs them,
           because a dropped key near theta raises theta again; inference does not.
Ours       choices that the abstract of the paper leaves open: the scale of codes, rounding instead of truncation in the
           split, the surrogate, the path of its gradient, and `unit=spread`. Keys share one scale for each example and
           head. In causal attention each key has its own, because a shared scale would reveal the future. Each query
           has its own scale: the rule compares within a row, and padded queries must not matter. The gradient of the
           compute term never reaches the scores; otherwise a model could save pairs by inflating its logits.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.backends import Backend, explain_unreadable
from thresher.attention.contract import Attended, Call, Cost, KeyCodes, Pattern
from thresher.attention.latte import kernel
from thresher.attention.latte.options import EstimateOptions, GateOptions
from thresher.attention.latte.quantise import Halves, complete_product, estimate_product, quantise, split_codes
from thresher.attention.mechanism import Mechanism
from thresher.attention.options import build_group, check_flags, check_integer
from thresher.attention.prepared import Prepared
from thresher.attention.shared.divergence import add_traces, trace_kept_keys, trace_rows, trace_vectors, zero_nonfinite
from thresher.attention.shared.functional import (
    attach_slope,
    expand_heads,
    fill_hidden,
    gated_softmax,
    masked_softmax,
    promote_to_fp32,
    straight_through,
)
from thresher.attention.shared.tail import TailKind, build_tail, count_tail_cost, weigh_with_tail
from thresher.attention.shared.thresholds import Differences, Gate, Thresholds, Unit
from thresher.kernels.build import can_use
from thresher.kernels.calling import unify_types

BLOCK_PAIRS = 2**19  # pairs at a time on a CPU, in whole examples, to stay in its cache
ESTIMATE, GATE = EstimateOptions(), GateOptions()


class Latte(Mechanism):
    """Attention over the keys whose estimated score lies within a threshold of the row's best.

    Args:
        estimate: How to estimate scores: `bits` (2, 4, 8 or "exact"), `split`, `scoring`; see `EstimateOptions`.
        gate: How to train thresholds: `mode`, `surrogate`, `tau`, `into_scores`; see `GateOptions`.
        unit: Unit of thresholds: "spread", the distance from a row's best estimate to its mean, or "nats", the rule of
            the paper, with which flat rows spend the budget on unimportant keys. A tuning may choose the other one.
        threshold: Initial threshold in that unit, at least 0.
        trainable: Whether thresholds receive gradients; they never do with `gate.mode=hard`.
        always_keep: Number of leading keys (class token, sink) that are kept where visible.
        tail: "mean" gives dropped keys the weight of their mean score, "none" no weight; see `shared/tail.py`.
        backend: "reference" is PyTorch; "cpu" is the kernel for CPUs and "triton" those for CUDA, which raise an error
            where they cannot compute a call; "auto" is a kernel where one can.

    Raises:
        ValueError: A hyper-parameter outside its range.
    """

    reads_sums = True
    keeps_types = True
    traces_itself = True
    selective = {"threshold": 0.3}
    dense_limit = {"threshold": float("inf"), "estimate": {"bits": "exact"}}

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        pattern: Pattern,
        *,
        estimate: EstimateOptions | Mapping[str, Any] = ESTIMATE,
        gate: GateOptions | Mapping[str, Any] = GATE,
        unit: Unit = "spread",
        threshold: float = 6.9,
        trainable: bool = True,
        always_keep: int = 0,
        tail: TailKind = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(num_heads, head_dim, pattern, backend)
        check_integer("always_keep", always_keep, 0)
        check_flags(trainable=trainable)
        self.estimate = build_group("estimate", EstimateOptions, estimate)
        self.gate = build_group("gate", GateOptions, gate)
        self.pools_tokens = not self.estimate.is_exact  # keys share the scale of their codes
        self.always_keep, self.tail = always_keep, build_tail(tail, num_heads)
        self.thresholds = Thresholds(
            num_heads,
            initial=threshold,
            tau=self.gate.tau,
            trainable=trainable and self.gate.mode != "hard",
            unit=unit,
            surrogate=self.gate.surrogate,
        )

    def reference(self, x: Prepared) -> Attended:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return self.attend(x)
        size = max(BLOCK_PAIRS // max(x.heads * x.n * x.m, 1), 1)
        if x.batch <= size:
            return self.attend(x)
        parts = [x.examples(slice(start, start + size)) for start in range(0, x.batch, size)]
        done = [self.attend(part) for part in parts]
        costs = zip(*(part.cost for part in done), strict=True)
        out = torch.cat([add_traces(attended.out, part.trace) for attended, part in zip(done, parts, strict=True)])
        losses = {name: torch.cat([attended.losses[name] for attended in done]) for name in done[0].losses}
        return Attended(out, Cost(*map(torch.cat, costs)), losses)

    def attend(self, x: Prepared) -> Attended:
        """Attend to all examples at once."""
        with torch.autocast(x.device.type, enabled=False):
            if self.tail is None:
                x.trace_scores()
            else:
                x.trace_all()  # a tail reads every visible value
            scores, difference, unit = self.compare(x)
            gate = self.thresholds(difference, x.visible, self.always_keep, surrogate=self.gate.mode != "hard")
            weights = F.dropout(self.weigh(scores, difference, unit, gate, x), x.dropout, x.dropout > 0)
            of_v = trace_vectors(x.v)
            if self.is_soft or self.tail is not None:  # every visible key has a weight
                by_values = trace_rows(None, of_v, x.call, self.pattern, (x.n, x.m))
            else:
                by_values = trace_kept_keys(of_v, gate.keep)
            out = add_traces(weights.to(x.v.dtype) @ zero_nonfinite(x.v, of_v), by_values)
        return Attended(out, self.charge(gate, x))

    @property
    def rows_together(self) -> int:
        """The number of consecutive queries that choose keys together."""
        return 1

    @property
    def unit(self) -> str:
        """The unit of thresholds, which a tuning may have changed."""
        return self.thresholds.unit

    @property
    def is_soft(self) -> bool:
        """Whether the gate weighs keys instead of selecting them."""
        return self.gate.mode == "soft" and self.training

    @property
    def needs_slope(self) -> bool:
        """Whether the gate has a gradient that reaches thresholds or scores."""
        return self.gate.mode != "hard" and (self.thresholds.offset.requires_grad or self.gate.into_scores)

    def wants_gradient(self, x: Prepared) -> bool:
        """Check whether a call needs gradients."""
        inputs = (x.grouped_q, x.grouped_k, x.grouped_v, self.thresholds.offset)
        return torch.is_grad_enabled() and any(each.requires_grad for each in inputs)

    def encode_keys(self, k: Tensor) -> KeyCodes | None:
        bits = self.estimate.bits
        if self.pattern is not Pattern.CAUSAL_SELF or isinstance(bits, str) or self.estimate.scoring == "int8":
            return None
        k = k.detach()
        if self.backend != "reference" and explain_unreadable((k,), "cpu") is None and can_use("latte"):
            (wide,) = unify_types(k.flatten(0, 1))
            codes, unit = self.encode(wide)
            return KeyCodes(codes.unflatten(0, k.shape[:2]), unit.unflatten(0, k.shape[:2])[..., None])
        codes, unit = quantise(promote_to_fp32(k), per_token=True)
        return KeyCodes(split_codes(codes, bits, self.estimate.split).high.to(torch.int8), unit)

    def encode(self, x: Tensor, per_token: bool = True) -> tuple[Tensor, Tensor]:
        """Encode queries or keys [g, n, d] with the kernel; return codes and their units."""
        assert isinstance(self.estimate.bits, int)
        return kernel.encode(x.detach(), per_token, self.estimate.bits, self.estimate.split == "truncate")

    def measure_differences(self, q: Tensor, k: Tensor, call: Call) -> Differences:
        """Measure the differences that thresholds are compared with."""
        x = self.prepare(q, k, k, call)
        with torch.autocast(q.device.type, enabled=False):
            return Differences(self.compare(x)[1], x.visible, self.always_keep)

    def compare(self, x: Prepared) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute scores, the difference of each estimate from its row's best, and the unit of differences."""
        scores, estimate = self.score(x)
        best = fill_hidden(estimate, x.visible, float("-inf")).amax(-1, keepdim=True)
        best = best.masked_fill(best == float("-inf"), 0)
        unit = measure_spread(estimate, best, x.visible) if self.unit == "spread" else None
        return scores, best - estimate if unit is None else (best - estimate) / unit, unit

    def score(self, x: Prepared) -> tuple[Tensor, Tensor]:
        """Compute the scores [b, h, n, m] that weigh kept pairs, and the estimates that select them."""
        q, k, call = promote_to_fp32(x.q), promote_to_fp32(x.k), x.call
        finite_q, finite_k = (zero_nonfinite(each, trace) for each, trace in zip((q, k), x.score_traces, strict=True))
        scores = (finite_q * x.scale) @ finite_k.transpose(-2, -1)
        if call.pairs is not None or self.ranks_queries:  # NaN would reach rows that do not see that token
            q, k = finite_q, finite_k
        estimate = scores.detach()
        if not self.estimate.is_exact:
            bits = 8 if isinstance(self.estimate.bits, str) else self.estimate.bits
            q_codes, q_scale = quantise(q, True)
            q_half = split_codes(q_codes, bits, self.estimate.split)
            if call.codes is None:
                k_codes, k_scale = quantise(k, self.pattern.causal)
                k_half = split_codes(k_codes, bits, self.estimate.split)
            else:
                high, k_scale = (expand_heads(codes, k.shape[1]).to(k.dtype) for codes in call.codes)
                k_half = Halves(high, torch.zeros_like(high), q_half.step)
            unit = x.scale * q_scale * k_scale.transpose(-2, -1)
            product = estimate_product(q_half, k_half)
            if self.estimate.bits != "exact":
                estimate = product * unit
            if self.estimate.scoring == "int8":
                scores = straight_through(complete_product(product, q_half, k_half) * unit, scores)
        if call.bias is not None:
            scores, estimate = scores + call.bias, estimate + call.bias.detach()
        return scores, estimate

    def weigh(self, scores: Tensor, difference: Tensor, unit: Tensor | None, gate: Gate, x: Prepared) -> Tensor:
        """Compute the softmax over kept keys, with the gate's gradient if it has one.

        With `unit=spread` that gradient is divided by the spread before it reaches the scores, but never enlarged;
        otherwise the nearly flat rows of an untrained network would dominate.
        """
        if self.tail is not None:
            return weigh_with_tail(
                scores, self.open_gate(scores, difference, unit, gate, x), x.visible, self.tail.values()
            )
        if self.is_soft:
            if self.gate.into_scores:
                difference = straight_through(difference, -scores if unit is None else -scores / unit.clamp_min(1))
            margin = self.thresholds.compute_margin(difference, x.visible, self.always_keep)
            return masked_softmax(scores + F.logsigmoid(margin), x.visible)
        if gate.slope is None:
            return masked_softmax(scores, gate.keep)
        worth = None if unit is None else unit.clamp_min(1)
        return gated_softmax(scores, gate.threshold, gate.keep, gate.slope, self.gate.into_scores, worth)

    def open_gate(self, scores: Tensor, difference: Tensor, unit: Tensor | None, gate: Gate, x: Prepared) -> Tensor:
        """Return the gate of each pair as a number, 1 where kept, with the gradient that `weigh` gives to it."""
        worth = 1.0 if unit is None else unit.clamp_min(1)
        if self.is_soft:
            if self.gate.into_scores:
                difference = straight_through(difference, -scores / worth)
            return self.thresholds.compute_margin(difference, x.visible, self.always_keep).sigmoid()
        opened = gate.keep.to(scores.dtype)
        if gate.slope is None:
            return opened
        opened = attach_slope(opened, gate.slope, gate.threshold)
        if self.gate.into_scores:
            opened = opened + attach_slope(torch.zeros_like(opened), gate.slope / worth, scores)
        return opened

    def charge(self, gate: Gate, x: Prepared) -> Cost:
        """Count the cost of a gate's decisions."""
        return self.count_cost(gate.kept, x)

    def count_cost(self, kept: Tensor, x: Prepared) -> Cost:
        """Count an estimate for every visible pair, the rest of its score and its value for every kept one."""
        share = self.estimate.share
        return Cost(
            score=kept * (self.head_dim * (1 - share)),
            value=kept * x.value_dim,
            select=x.pairs * (self.head_dim * share) + (0 if self.tail is None else count_tail_cost(x, kept)),
            dense=x.pairs * (self.head_dim + x.value_dim),
            kept=kept,
            visible=x.pairs,
        )

    def extra_repr(self) -> str:
        estimate = f"bits={self.estimate.bits}, scoring={self.estimate.scoring}"
        return f"{super().extra_repr()}, {estimate}, mode={self.gate.mode}, unit={self.unit}"


def measure_spread(
    estimate: Float[Tensor, "b h n m"], best: Float[Tensor, "b h n 1"], visible: Bool[Tensor, "#b #h #n m"] | None
) -> Float[Tensor, "b h n 1"]:
    """Measure how far a row's best lies above the mean of its visible keys; positive even if all are equal."""
    if visible is None:
        mean = estimate.mean(-1, keepdim=True)
    else:
        count = visible.sum(-1, keepdim=True).clamp_min(1)
        mean = estimate.masked_fill(~visible, 0).sum(-1, keepdim=True) / count
    return (best - mean).clamp_min(torch.finfo(estimate.dtype).eps)
