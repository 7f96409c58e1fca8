"""LATTE: head-wise trainable thresholds on low-precision score estimates (arXiv 2404.07519).

Keeps      key j of row i iff max_j S_ij - S_ij <= theta_h u_i, S estimated from the top bits of 8-bit codes.
           `unit=nats`, u_i = 1, is the rule of the paper: since P_ij / max_j P_ij = exp(S_ij - max_j S_ij), it keeps
           the keys whose probability is at least exp(-theta_h) of the row's largest. With `unit=spread` u_i is the
           distance from the row's best estimate to its mean one, so that a row keeps about as many keys whether it is
           flat or peaked.
Costs      in 8-bit MACs: D (bits/8)^2 a visible pair for the estimate, and for each kept pair the rest of
           its score, D (1 - (bits/8)^2), and Dv for its value. With 4 bits and D = Dv that is (1 + 7 kept) / 8
           of dense. The exact score of a kept pair is counted as the 8-bit one that it stands for;
           `scoring=int8` computes that one. Comparisons, maxima, means and the softmax are not counted.
Trains     theta, one for each head (see `thresholds.py` for base and offset). `ste`: hard gate forward,
           gradient of a sigmoid of width tau; `soft`: that sigmoid also forward in training; `hard`: theta is fixed.
Emulates   the pruning accelerator of the paper: this file computes all scores and discards. Training needs them (a
           dropped key near theta is what raises theta again); inference would not.
Ours       what the paper's abstract leaves open: the scale of the codes (keys: one for each example and head, in
           causal attention one for each token, where a shared one would see the future; queries: one for each
           token, since the rule compares within a row and padded queries must not matter), rounding instead of
           truncation in the split, the surrogate, where its gradient goes, and `unit=spread`. The gradient of the
           compute term never reaches the scores: a model could otherwise save pairs by inflating its logits.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.backends import Backend, check_backend, served_by_kernel
from thresher.attention.base import Attended, Call, Cost, KeyCodes, Mechanism, Pattern
from thresher.attention.dense import attend_densely
from thresher.attention.functional import (
    at_least_fp32,
    expand_heads,
    fill_hidden,
    gated_softmax,
    masked_softmax,
    straight_through,
)
from thresher.attention.options import check_choice, check_flags, check_integer
from thresher.attention.quantise import Halves, Split, completed_product, estimated_product, quantise, split_codes
from thresher.attention.thresholds import Differences, Gate, Surrogate, Thresholds
from thresher.attention.visibility import count_pairs, hide_tokens, no_pairs, visible_keys_of, visible_pairs
from thresher.kernels import latte as kernel
from thresher.kernels.calling import readable

Mode = Literal["ste", "soft", "hard"]
Scoring = Literal["exact", "int8"]
Unit = Literal["nats", "spread"]

BLOCK_PAIRS = 2**19  # pairs at a time on a CPU, in whole examples: their maps then stay in its cache


class Latte(Mechanism):
    """Attention over the keys whose estimated score lies within theta of the row's best.

    Args:
        est_bits: Bits of the estimate: 2, 4, 8, or "exact" for unquantised scores.
        split: How codes are split into high and low bits, "round" or "truncate".
        scoring: Scores of kept pairs: "exact", or "int8" for the completed 8-bit product.
        mode: "ste", "soft" or "hard"; evaluation is hard in all three.
        unit: Of thresholds: "spread", the distance from a row's best estimate to its mean one, or "nats", the rule of
            the paper, under which flat rows use up the budget with keys that matter little.
        theta: Initial threshold in that unit, at least 0.
        tau: Width of the surrogate gradient in that unit.
        surrogate: Step that lends the gate its gradient: "sigmoid"; "compact", as steep at theta but flat from 3 tau
            away from it, so that only pairs near the threshold have a part in it; "inside", kept pairs alone.
        trainable: Whether thresholds receive gradients; `hard` implies that they do not.
        gate_grad_to_scores: Let the task's gate gradient reach the scores too, so that a dropped key can climb back.
        always_keep: Number of leading keys (class token, sink) that are kept wherever visible.
        backend: "reference" is PyTorch; "cpu" the kernel, refused where it cannot compute a call; "auto" the kernel
            wherever it can.

    Raises:
        ValueError: A hyper-parameter outside its range.
    """

    dense_limit = {"theta": float("inf"), "est_bits": "exact"}

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        pattern: Pattern,
        *,
        est_bits: int | str = 4,
        split: Split = "round",
        scoring: Scoring = "exact",
        mode: Mode = "ste",
        unit: Unit = "spread",
        theta: float = 6.9,
        tau: float = 0.5,
        surrogate: Surrogate = "sigmoid",
        trainable: bool = True,
        gate_grad_to_scores: bool = True,
        always_keep: int = 0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(num_heads, head_dim, pattern)
        check_backend(backend, "latte")
        for name, got, allowed in (
            ("est_bits", est_bits, (2, 4, 8, "exact")),
            ("split", split, get_args(Split)),
            ("scoring", scoring, get_args(Scoring)),
            ("mode", mode, get_args(Mode)),
            ("unit", unit, get_args(Unit)),
            ("surrogate", surrogate, get_args(Surrogate)),
        ):
            check_choice(name, got, allowed)
        check_integer("always_keep", always_keep, 0)
        check_flags(trainable=trainable, gate_grad_to_scores=gate_grad_to_scores)
        if mode == "soft" and surrogate != "sigmoid":
            raise ValueError(f"mode=soft weighs keys by a sigmoid; surrogate={surrogate} is for mode=ste")
        self.est_bits = est_bits
        self.split: Split = split
        self.scoring = scoring
        self.mode = mode
        self.unit = unit
        self.gate_grad_to_scores = gate_grad_to_scores
        self.always_keep = always_keep
        self.backend = backend
        self.surrogate: Surrogate = surrogate
        self.thresholds = Thresholds(
            num_heads, init=theta, tau=tau, trainable=trainable and mode != "hard", unit=unit, surrogate=surrogate
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        if no_pairs(q, k):
            return attend_densely(q, k, v, call, self.pattern)
        if served_by_kernel(self.backend, "latte", (q, k, v), self.obstacle((q, k, v), call)):
            alone = q.shape[2] == 1 and self.pattern is Pattern.CAUSAL_SELF and not self.wants_gradient(q, k, v)
            return self.decode_on_kernel(q, k, v, call) if alone else self.attend_on_kernel(q, k, v, call)
        if q.device.type != "cpu" or torch.compiler.is_compiling():
            return self.attend(q, k, v, call)
        size = max(BLOCK_PAIRS // max(q.shape[1] * q.shape[2] * k.shape[2], 1), 1)
        if len(q) <= size:
            return self.attend(q, k, v, call)
        blocks = [slice(start, start + size) for start in range(0, len(q), size)]
        done = [self.attend(q[rows], k[rows], v[rows], call.examples(rows)) for rows in blocks]
        costs = zip(*(block.cost for block in done), strict=True)
        return Attended(torch.cat([block.out for block in done]), Cost(*map(torch.cat, costs)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """Attend, all examples at once."""
        shape = (*q.shape[:3], k.shape[2])
        k, v = expand_heads(k, shape[1]), expand_heads(v, shape[1])
        visible = visible_pairs(call, self.pattern, shape[2], shape[3], q.device)
        q, k, v = hide_tokens(q, k, v, call, self.pattern)
        with torch.autocast(q.device.type, enabled=False):
            scores, difference, unit = self.judged(q, k, call, visible)
            gate = self.thresholds(difference, visible, self.always_keep, surrogate=self.mode != "hard")
            weights = self.weights(scores, difference, unit, gate, visible)
            weights = F.dropout(weights, self.dropout, self.training)
        pairs = count_pairs(visible, shape, q.device)
        return Attended(weights.to(v.dtype) @ v, self.cost(gate.kept, pairs, v.shape[-1]))

    def obstacle(self, inputs: tuple[Tensor, ...], call: Call) -> str | None:
        """Say why the kernel cannot compute a call."""
        if call.pairs is not None or call.bias is not None:
            return "it has no masks of pairs and no biases"
        if self.est_bits == "exact" or self.scoring == "int8":
            return "it estimates by codes and weighs by exact scores"
        if self.mode == "soft" and self.training:
            return "it has no soft gate"
        if self.needs_slope and self.surrogate == "sigmoid" and self.wants_gradient(*inputs):
            return "a sigmoid's gradient reaches every pair; those of surrogate=compact and inside do not"
        if self.dropout and self.training:
            return "it has no dropout of attention weights"
        return None

    def wants_gradient(self, *inputs: Tensor) -> bool:
        """Say whether a call is to be differentiated."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, self.thresholds.offset))

    @property
    def needs_slope(self) -> bool:
        """Whether the gate has a gradient, and somewhere to go."""
        return self.mode != "hard" and (self.thresholds.offset.requires_grad or self.gate_grad_to_scores)

    def attend_on_kernel(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """Attend on the CPU's kernel; codes and their scales are made as they are for PyTorch."""
        assert isinstance(self.est_bits, int)
        (b, h, n, d), m, dtype = q.shape, k.shape[2], v.dtype
        k, v = expand_heads(k, h), expand_heads(v, h)
        q, k, v = (x.flatten(0, 1) for x in readable(*hide_tokens(q, k, v, call, self.pattern)))
        step = 2 ** (8 - self.est_bits)
        q_codes, q_unit = self.encoded(q)
        if call.codes is None:
            k_codes, k_unit = self.encoded(k, per_token=self.pattern.causal)
        else:
            k_codes, k_unit = (expand_heads(x, h).flatten(0, 1) for x in call.codes)
            k_unit = k_unit.squeeze(-1).to(q_unit.dtype)
        shown = [x if x is None else x[:, None].expand(-1, h, -1).flatten(0, 1) for x in (call.queries, call.keys)]
        gate = kernel.Gate(
            q_codes=q_codes,
            k_codes=k_codes,
            q_unit=q_unit * d**-0.5,
            k_unit=k_unit,
            shown_q=shown[0],
            shown_k=shown[1],
            theta=self.thresholds.values().to(q_unit.dtype).expand(b, h).flatten(),
            tau=self.thresholds.tau if self.needs_slope else None,
            shift=m - n if self.pattern is Pattern.CAUSAL_SELF and n > 1 else None,
            spread=self.unit == "spread",
            always_keep=self.always_keep,
            step=float(step * step),
            into_scores=self.gate_grad_to_scores,
            inside=self.surrogate == "inside",
        )
        out, kept, _, _ = kernel.attend(q, k, v, *gate, d**-0.5)
        if not self.thresholds.offset.requires_grad:
            kept = kept.detach()
        visible = visible_keys_of(call, self.pattern, n, m, q.device).sum(-1).float().expand(b, h)
        return Attended(out.unflatten(0, (b, h)).to(dtype), self.cost(kept.unflatten(0, (b, h)), visible, v.shape[-1]))

    def decode_on_kernel(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """Attend with the last query on the CPU's kernel; queries that share keys are its rows."""
        assert isinstance(self.est_bits, int)
        (b, h, n, d), (groups, m), dtype = q.shape, k.shape[1:3], v.dtype
        rows, step = h // groups, 2 ** (8 - self.est_bits)
        q, k, v = readable(q.reshape(b * groups, rows, d), k.flatten(0, 1), v.flatten(0, 1))
        q_codes, q_unit = self.encoded(q)
        k_codes, k_unit = self.encoded(k) if call.codes is None else (x.flatten(0, 1) for x in call.codes)
        out, kept = kernel.decode(
            q=q,
            k=k,
            v=v,
            q_codes=q_codes,
            k_codes=k_codes,
            q_unit=q_unit * d**-0.5,
            k_unit=k_unit.view(b * groups, m).to(q_unit.dtype),
            shown_k=None if call.keys is None else call.keys[:, None].expand(-1, groups, -1).flatten(0, 1),
            theta=self.thresholds.values().to(q_unit.dtype).expand(b, h).reshape(b * groups, rows),
            spread=self.unit == "spread",
            always_keep=self.always_keep,
            step=float(step * step),
            scale=d**-0.5,
        )
        out, kept = out.view(b, h, n, -1).to(dtype), kept.view(b, h)
        if call.queries is not None:
            out, kept = out.masked_fill(~call.queries[:, None, :, None], 0), kept * call.queries
        visible = visible_keys_of(call, self.pattern, n, m, q.device).sum(-1).float().expand(b, h)
        return Attended(out, self.cost(kept, visible, v.shape[-1]))

    def encoded(self, x: Tensor, per_token: bool = True) -> tuple[Tensor, Tensor]:
        """Return what the kernel makes of queries or keys [g, n, d]: codes, and what they stand for."""
        assert isinstance(self.est_bits, int)
        return kernel.encode(x.detach(), per_token, self.est_bits, self.split == "truncate")

    def codes_of(self, k: Tensor) -> KeyCodes | None:
        if self.pattern is not Pattern.CAUSAL_SELF or isinstance(self.est_bits, str) or self.scoring == "int8":
            return None
        k = k.detach()
        if served_by_kernel(self.backend, "latte", (k,), None):
            (wide,) = readable(k.flatten(0, 1))
            codes, unit = self.encoded(wide)
            return KeyCodes(codes.unflatten(0, k.shape[:2]), unit.unflatten(0, k.shape[:2])[..., None])
        codes, unit = quantise(at_least_fp32(k), per_token=True)
        return KeyCodes(split_codes(codes, self.est_bits, self.split).high.to(torch.int8), unit)

    def differences(self, q: Tensor, k: Tensor, call: Call) -> Differences:
        """Return what the thresholds of a call are compared with."""
        k = expand_heads(k, q.shape[1])
        visible = visible_pairs(call, self.pattern, q.shape[2], k.shape[2], q.device)
        q, k, _ = hide_tokens(q, k, k, call, self.pattern)
        with torch.autocast(q.device.type, enabled=False):
            return Differences(self.judged(q, k, call, visible)[1], visible, self.always_keep)

    def judged(self, q: Tensor, k: Tensor, call: Call, visible: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return scores, how far each estimate lies below its row's best, and the unit in which that is counted."""
        scores, estimate = self.scores(at_least_fp32(q), at_least_fp32(k), call)
        best = fill_hidden(estimate, visible, float("-inf")).amax(-1, keepdim=True)
        best = best.masked_fill(best == float("-inf"), 0)
        unit = spread_of(estimate, best, visible) if self.unit == "spread" else None
        return scores, best - estimate if unit is None else (best - estimate) / unit, unit

    def scores(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Return the scores [b, h, n, m] that weigh kept pairs, and the estimates that decide which are kept."""
        scale = q.shape[-1] ** -0.5
        scores = (q * scale) @ k.transpose(-2, -1)
        estimate = scores.detach()
        if self.est_bits != "exact" or self.scoring == "int8":
            bits = 8 if isinstance(self.est_bits, str) else self.est_bits
            q_codes, q_scale = quantise(q, True)
            q_half = split_codes(q_codes, bits, self.split)
            if call.codes is None:
                k_codes, k_scale = quantise(k, self.pattern.causal)
                k_half = split_codes(k_codes, bits, self.split)
            else:
                high, k_scale = (expand_heads(x, k.shape[1]).to(k.dtype) for x in call.codes)
                k_half = Halves(high, torch.zeros_like(high), q_half.step)
            unit = scale * q_scale * k_scale.transpose(-2, -1)
            product = estimated_product(q_half, k_half)
            if self.est_bits != "exact":
                estimate = product * unit
            if self.scoring == "int8":
                scores = straight_through(completed_product(product, q_half, k_half) * unit, scores)
        if call.bias is not None:
            scores, estimate = scores + call.bias, estimate + call.bias.detach()
        return scores, estimate

    def weights(
        self, scores: Tensor, difference: Tensor, unit: Tensor | None, gate: Gate, visible: Tensor | None
    ) -> Tensor:
        """Return the softmax over kept keys, with the gate's gradient when one is wanted.

        In spreads that gradient reaches the scores divided by the spread, but never enlarged: the nearly flat
        rows of a young network would drown everything else.
        """
        if self.mode == "soft" and self.training:
            if self.gate_grad_to_scores:
                difference = straight_through(difference, -scores if unit is None else -scores / unit.clamp_min(1))
            return masked_softmax(
                scores + F.logsigmoid(self.thresholds.margin(difference, visible, self.always_keep)), visible
            )
        if gate.slope is None:
            return masked_softmax(scores, gate.keep)
        worth = None if unit is None else unit.clamp_min(1)
        return gated_softmax(scores, gate.theta, gate.keep, gate.slope, self.gate_grad_to_scores, worth)

    def cost(self, kept: Tensor, visible: Tensor, value_dim: int) -> Cost:
        share = 1.0 if isinstance(self.est_bits, str) else (self.est_bits / 8) ** 2
        return Cost(
            score=kept * (self.head_dim * (1 - share)),
            value=kept * value_dim,
            select=visible * (self.head_dim * share),
            dense=visible * (self.head_dim + value_dim),
            kept=kept,
            visible=visible,
        )

    def extra_repr(self) -> str:
        own = f"est_bits={self.est_bits}, scoring={self.scoring}, mode={self.mode}, unit={self.unit}"
        return f"{super().extra_repr()}, {own}"


def spread_of(
    estimate: Float[Tensor, "b h n m"], best: Float[Tensor, "b h n 1"], visible: Bool[Tensor, "#b #h #n m"] | None
) -> Float[Tensor, "b h n 1"]:
    """Return how far the best of a row lies above the mean of its visible keys; positive where all are equal, too."""
    if visible is None:
        mean = estimate.mean(-1, keepdim=True)
    else:
        count = visible.sum(-1, keepdim=True).clamp_min(1)
        mean = estimate.masked_fill(~visible, 0).sum(-1, keepdim=True) / count
    return (best - mean).clamp_min(torch.finfo(estimate.dtype).eps)
