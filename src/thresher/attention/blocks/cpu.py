"""Blocks on CPUs: votes on integer estimates, then dense products of a block's queries with its gathered keys."""

import torch

from thresher.attention.backends import Implementation
from thresher.attention.blocks import kernel
from thresher.attention.blocks.mechanism import Blocks
from thresher.attention.contract import Attended
from thresher.attention.latte.cpu import DecodingOnCpu, build_gate
from thresher.attention.latte.mechanism import Latte
from thresher.attention.prepared import Prepared
from thresher.attention.shared.divergence import zero_nonfinite
from thresher.attention.shared.tail import expand_factor
from thresher.kernels.calling import choose_sum_dtype, unify_types


class DecodingBlocksOnCpu(DecodingOnCpu):
    """The kernel of LATTE for the last query of a sequence, which is a block of its own."""

    def explain_refusal(self, mechanism: Latte, x: Prepared) -> str | None:
        assert isinstance(mechanism, Blocks)
        if not mechanism.block.is_plain:
            return f"it has no {mechanism.block.describe()}"
        return super().explain_refusal(mechanism, x)


class BlocksOnCpu(Implementation[Blocks]):
    """The kernel `blocks`, forward and backward."""

    kernel = "blocks"

    def explain_refusal(self, mechanism: Blocks, x: Prepared) -> str | None:
        if not mechanism.block.is_plain:
            return f"it has no {mechanism.block.describe()}"
        if x.call.pairs is not None or x.call.bias is not None:
            return "it has no masks of pairs and no biases"
        if x.call.slots is not None and x.n > 1:
            return "it needs queries in the order of their keys"
        if mechanism.estimate.bits == "exact" or mechanism.estimate.scoring == "int8":
            return "it needs estimates from codes and weights from exact scores"
        if mechanism.needs_slope and mechanism.wants_gradient(x):
            if mechanism.gate.surrogate != "inside":
                return "its gate has a gradient for kept pairs only; use gate.surrogate=inside"
            if mechanism.gate.into_scores:
                return "the gradient of its gate does not reach scores; use gate.into_scores=false"
        return "it has no dropout of attention weights" if x.dropout else None

    def run(self, mechanism: Blocks, x: Prepared) -> Attended:
        if mechanism.tail is None:
            x.trace_scores()
        else:
            x.trace_all()  # a tail reads every visible value
        traces = x.score_traces
        finite = tuple(zero_nonfinite(each, trace) for each, trace in zip((x.q, x.k), traces, strict=True))
        q, k, v = (each.flatten(0, 1) for each in unify_types(*finite, x.v))
        # By votes, tokens that are not finite count as zero; a row alone chooses as in LATTE, which sees them.
        seen_q, seen_k = (q, k) if mechanism.votes else (each.flatten(0, 1) for each in unify_types(x.q, x.k, x.v)[:2])
        gate = build_gate(mechanism, x, seen_q, seen_k)
        block = mechanism.block
        sharing = kernel.Sharing(size=block.queries, votes=mechanism.votes, every=block.every)
        factor = expand_factor(mechanism.tail, x, choose_sum_dtype(q))
        given = {"q": q, "k": k, "v": v, "scale": x.scale, "tail_factor": factor}
        out, kept, of_rows, computed, *_ = kernel.attend(**given, **gate._asdict(), **sharing._asdict())
        shape = (x.batch, x.heads)
        kept, of_rows = kept.unflatten(0, shape), of_rows.unflatten(0, shape)
        if not mechanism.thresholds.offset.requires_grad:
            kept = kept.detach()
        if mechanism.votes:
            computed, unscored = kept.detach(), (of_rows * ~mechanism.find_voters(x)).sum(-1).to(kept.dtype)
        else:
            computed = computed.unflatten(0, shape).sum(-1).to(kept.dtype)
            unscored = torch.zeros_like(computed)
        cost = mechanism.count_block_cost(x, kept, computed, unscored)
        return Attended(out.unflatten(0, shape), cost)
