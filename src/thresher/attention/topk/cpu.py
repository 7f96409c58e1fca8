"""Top-k on CPUs: compute each score once, then touch kept pairs only."""

import torch

from thresher.attention.backends import Implementation
from thresher.attention.contract import Attended, Pattern
from thresher.attention.prepared import Prepared
from thresher.attention.shared.divergence import trace_rows, trace_vectors
from thresher.attention.shared.functional import expand_heads
from thresher.attention.shared.sums import RunningSums, TokenSums
from thresher.attention.shared.tail import expand_factor
from thresher.attention.topk import kernel
from thresher.attention.topk.mechanism import TopK
from thresher.kernels.calling import choose_sum_dtype, unify_types


class TopKOnCpu(Implementation[TopK]):
    """The kernel `topk`, forward and backward."""

    kernel = "topk"

    def explain_refusal(self, mechanism: TopK, x: Prepared) -> str | None:
        if x.call.pairs is not None or x.call.bias is not None:
            return "it has no masks of pairs and no biases"
        if mechanism.trains_factors:
            return "it has no gradient of the factors of heads"
        return "it has no dropout of attention weights" if x.dropout else None

    def run(self, mechanism: TopK, x: Prepared) -> Attended:
        sums = _read_sums(mechanism, x)
        if sums is not None:
            of_sums = trace_vectors(torch.cat(sums, -1)).repeat_interleave(x.heads // sums.keys.shape[1], 1)
            x.trace = trace_rows(trace_vectors(x.q) + of_sums[..., None], None, x.call, x.pattern, (x.n, x.m))
        elif mechanism.tail is None:
            x.trace_scores()
        else:
            x.trace_all()
        q, k, v = (each.flatten(0, 1) for each in unify_types(x.q, x.k, x.v))
        keys, limits = x.call.keys, mechanism.count_limits(x).expand(x.batch, x.heads, x.n).flatten(0, 1)
        seen = None if keys is None else keys[:, None].expand(x.batch, x.heads, x.m).flatten(0, 1)
        given = {}
        if sums is not None:
            of_keys, of_values = (expand_heads(each[:, :, None], x.heads).flatten(0, 2) for each in sums)
            given = {"key_sum": of_keys.to(choose_sum_dtype(q)), "value_sum": of_values.to(choose_sum_dtype(q))}
        out, _, _, _ = kernel.attend(
            q=q,
            k=k,
            v=v,
            scale=x.scale,
            seen=seen,
            limit=limits,
            most=mechanism.count_most(x),
            shift=x.causal_shift,
            tail_factor=expand_factor(mechanism.tail, x, choose_sum_dtype(q)),
            **given,
        )
        return mechanism.charge(x, out.unflatten(0, (x.batch, x.heads)))


def _read_sums(mechanism: TopK, x: Prepared) -> TokenSums | None:
    """Read the sums of visible keys and values for a tail in decoding without gradient, which a cache may keep."""
    if mechanism.tail is None or x.n != 1 or x.pattern is not Pattern.CAUSAL_SELF:
        return None
    tensors = (x.grouped_q, x.grouped_k, x.grouped_v, mechanism.tail.factor)
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        return None
    return (x.call.sums or RunningSums()).read(x.grouped_k, x.grouped_v, x.call.keys)
