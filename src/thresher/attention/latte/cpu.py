"""LATTE on CPUs, for training and decoding: estimates from integer codes, exact scores for kept pairs only."""

import torch
from torch import Tensor

from thresher.attention.backends import Implementation
from thresher.attention.contract import Attended, Pattern
from thresher.attention.latte import kernel
from thresher.attention.latte.mechanism import Latte
from thresher.attention.prepared import Prepared
from thresher.attention.shared.divergence import trace_rows, trace_vectors
from thresher.attention.shared.functional import expand_heads
from thresher.attention.shared.sums import RunningSums
from thresher.attention.shared.tail import expand_factor
from thresher.kernels.calling import choose_sum_dtype, unify_types


class TrainingOnCpu(Implementation[Latte]):
    """The kernel `latte`, forward and backward."""

    kernel = "latte"

    def explain_refusal(self, mechanism: Latte, x: Prepared) -> str | None:
        if x.call.pairs is not None or x.call.bias is not None:
            return "it has no masks of pairs and no biases"
        if mechanism.estimate.bits == "exact" or mechanism.estimate.scoring == "int8":
            return "it needs estimates from codes and weights from exact scores"
        if mechanism.is_soft:
            return "it has no soft gate"
        if mechanism.needs_slope and mechanism.gate.surrogate == "sigmoid" and mechanism.wants_gradient(x):
            return "the gradient of a sigmoid reaches every pair; use gate.surrogate=compact or inside"
        return "it has no dropout of attention weights" if x.dropout else None

    def run(self, mechanism: Latte, x: Prepared) -> Attended:
        b, h = x.batch, x.heads
        if mechanism.tail is not None:
            x.trace_all()  # a tail reads every visible value
        q, k, v = (each.flatten(0, 1) for each in unify_types(x.q, x.k, x.v))
        gate = build_gate(mechanism, x, q, k)
        factor = expand_factor(mechanism.tail, x, choose_sum_dtype(q))
        out, kept, *_ = kernel.attend(q=q, k=k, v=v, scale=x.scale, tail_factor=factor, **gate._asdict())
        of_q, of_k = (trace_vectors(unit.unflatten(0, (b, h))[..., None]) for unit in (gate.q_unit, gate.k_unit))
        if mechanism.tail is None:
            x.trace = trace_codes(of_q, of_k, x)
        if not mechanism.thresholds.offset.requires_grad:
            kept = kept.detach()
        return Attended(out.unflatten(0, (b, h)), mechanism.count_cost(kept.unflatten(0, (b, h)), x))


class DecodingOnCpu(TrainingOnCpu):
    """The kernel `latte` for the last query of a sequence; query heads that share keys form the rows."""

    def explain_refusal(self, mechanism: Latte, x: Prepared) -> str | None:
        if x.n != 1 or mechanism.pattern is not Pattern.CAUSAL_SELF or mechanism.wants_gradient(x):
            return "it only decodes: one query of causal self attention, without gradient"
        return super().explain_refusal(mechanism, x)

    def run(self, mechanism: Latte, x: Prepared) -> Attended:
        b, h, n, m = x.shape
        groups = x.grouped_k.shape[1]
        rows = h // groups
        q = x.grouped_q.reshape(b * groups, rows, x.head_dim)
        q, k, v = unify_types(q, x.grouped_k.flatten(0, 1), x.grouped_v.flatten(0, 1))
        q_codes, q_unit = mechanism.encode(q)
        codes = x.call.codes
        k_codes, k_unit = mechanism.encode(k) if codes is None else (each.flatten(0, 1) for each in codes)
        keys, sums, dtype = x.call.keys, None, choose_sum_dtype(q)
        tail: dict[str, Tensor | None] = dict.fromkeys(("key_sum", "value_sum", "tail_factor"))
        if mechanism.tail is not None:
            sums = (x.call.sums or RunningSums()).read(x.grouped_k, x.grouped_v, keys)
            factor = mechanism.tail.values().to(dtype).expand(b, h).reshape(b * groups, rows)
            of_keys, of_values = (each.to(dtype).flatten(0, 1) for each in sums)
            tail = {"key_sum": of_keys, "value_sum": of_values, "tail_factor": factor}
        out, kept = kernel.decode(
            q=q,
            k=k,
            v=v,
            q_codes=q_codes,
            k_codes=k_codes,
            q_unit=q_unit * x.scale,
            k_unit=k_unit.view(b * groups, m).to(q_unit.dtype),
            shown_k=None if keys is None else keys[:, None].expand(-1, groups, -1).flatten(0, 1),
            threshold=mechanism.thresholds.values().to(q_unit.dtype).expand(b, h).reshape(b * groups, rows),
            spread=mechanism.thresholds.unit == "spread",
            always_keep=mechanism.always_keep,
            step=compute_code_step(mechanism) ** 2,
            scale=x.scale,
            **tail,
        )
        of_q, of_k = (trace_vectors(unit.reshape(b, -1, length, 1)) for unit, length in ((q_unit, 1), (k_unit, m)))
        if sums is not None:  # of every visible key and value
            of_q = of_q + trace_vectors(torch.cat(sums, -1)).repeat_interleave(rows, 1)[..., None]
        x.trace = trace_codes(of_q, of_k.repeat_interleave(rows, 1), x)
        kept = kept.view(b, h)
        if x.call.queries is not None:
            kept = kept * x.call.queries
        return Attended(out.view(b, h, n, -1), mechanism.count_cost(kept, x))


def build_gate(mechanism: Latte, x: Prepared, q: Tensor, k: Tensor) -> kernel.Gate:
    """Build the gate of a call from its queries and keys, [g, tokens, d]."""
    b, h = x.batch, x.heads
    q_codes, q_unit = mechanism.encode(q)
    if x.call.codes is None:
        k_codes, k_unit = mechanism.encode(k, per_token=mechanism.pattern.causal)
    else:
        k_codes, k_unit = (expand_heads(codes, h).flatten(0, 1) for codes in x.call.codes)
        k_unit = k_unit.squeeze(-1).to(q_unit.dtype)
    shown_q, shown_k = (
        None if hidden is None else hidden[:, None].expand(-1, h, -1).flatten(0, 1)
        for hidden in (x.call.queries, x.call.keys)
    )
    thresholds = mechanism.thresholds
    return kernel.Gate(
        q_codes=q_codes,
        k_codes=k_codes,
        q_unit=q_unit * x.scale,
        k_unit=k_unit,
        shown_q=shown_q,
        shown_k=shown_k,
        threshold=thresholds.values().to(q_unit.dtype).expand(b, h).flatten(),
        tau=thresholds.tau if mechanism.needs_slope else None,
        shift=x.causal_shift,
        spread=mechanism.thresholds.unit == "spread",
        always_keep=mechanism.always_keep,
        step=compute_code_step(mechanism) ** 2,
        into_scores=mechanism.gate.into_scores,
        inside=mechanism.gate.surrogate == "inside",
    )


def compute_code_step(mechanism: Latte) -> float:
    """Compute the step of the high part of a code, in units of the whole code."""
    assert isinstance(mechanism.estimate.bits, int)
    return float(2 ** (8 - mechanism.estimate.bits))


def trace_codes(queries: Tensor, keys: Tensor, x: Prepared) -> Tensor | None:
    """Compute the traces of rows from traces of code units, which may belong to hidden keys."""
    if x.call.keys is not None and keys.shape[-1] == x.m:
        keys = keys.masked_fill(~x.call.keys[:, None], 0)
    return trace_rows(queries, keys, x.call, x.pattern, (x.n, x.m))
