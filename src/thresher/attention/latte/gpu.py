"""LATTE on GPUs, in Triton: tiles of queries and keys without a survivor are skipped, exact scores for the others.

A first pass over integer estimates finds the statistics of each row, a second one the tiles in which any row keeps a
key. Forward and backward read the lists of these tiles, and each row its own keys in them.
"""

import functools

import torch
from torch import Tensor

from thresher.attention.backends import Implementation
from thresher.attention.contract import Attended
from thresher.attention.latte.mechanism import Latte
from thresher.attention.latte.quantise import quantise, split_codes
from thresher.attention.prepared import Prepared
from thresher.attention.shared.functional import expand_heads, promote_to_fp32
from thresher.attention.shared.tail import expand_factor, sum_visible_tokens
from thresher.kernels.triton import lists
from thresher.kernels.triton.attend import Found, Setting, Tail, attend
from thresher.kernels.triton.launch import explain_unusable
from thresher.kernels.triton.lists import Codes, Lists, Masks, Rows


class LatteOnGpu(Implementation[Latte]):
    """The kernels of Triton over tiles, forward and backward."""

    backend = "triton"
    device = None  # the interpreter of triton runs on CPUs
    kernel = None

    def explain_refusal(self, mechanism: Latte, x: Prepared) -> str | None:
        refused = explain_refusal(mechanism, x)
        return refused and f"{refused}; backend=reference computes it"

    def run(self, mechanism: Latte, x: Prepared) -> Attended:
        of_values = x.trace_all(values=mechanism.tail is not None)
        with torch.autocast(x.device.type, enabled=False):
            codes, masks, threshold = encode_tokens(mechanism, x), build_masks(x), expand_thresholds(mechanism, x)
            rows = lists.describe_rows(codes, masks, mechanism.unit == "spread", mass=False)
            size = choose_tile(x)
            blocks = range(-(-x.n // size))
            marks = lists.mark_chosen(
                codes, masks, rows, threshold.detach(), mechanism.always_keep, size, blocks, tile=size
            )
            listed, transposed = lists.list_marks([marks]), lists.list_marks([marks.mT])
            found = attend_to_lists(mechanism, x, of_values, masks, listed, size, codes, rows, transposed)
        kept = count_kept(found, mechanism, x)
        return Attended(read_output(found, mechanism, x), mechanism.count_cost(kept, x))


def explain_refusal(mechanism: Latte, x: Prepared) -> str | None:
    """Explain why the kernels cannot compute a call; None if they can."""
    tokens = (x.grouped_q, x.grouped_k, x.grouped_v)
    unusable = explain_unusable(x.device, {each.dtype for each in tokens}, (x.head_dim, x.value_dim))
    if unusable is not None:
        return unusable
    if x.device.type == "cpu" and mechanism.backend == "auto":
        return "on CPUs the interpreter of triton is for tests; set backend=triton"
    if x.call.pairs is not None or x.call.bias is not None:
        return "it has no masks of pairs and no biases"
    if mechanism.estimate.bits == "exact" or mechanism.estimate.scoring == "int8":
        return "it needs estimates from codes and weights from exact scores"
    if torch.compiler.is_compiling():
        return "the lengths of its lists are not known before it runs"
    if x.dropout:
        return "it has no dropout of attention weights"
    if mechanism.is_soft:
        return "it has no soft gate"
    if mechanism.needs_slope and mechanism.wants_gradient(x) and mechanism.gate.surrogate != "inside":
        return "its gate has a gradient for kept pairs only; use gate.surrogate=inside"
    return None


def encode_tokens(mechanism: Latte, x: Prepared) -> Codes:
    """Encode queries and keys as the reference does."""
    bits, split = mechanism.estimate.bits, mechanism.estimate.split
    assert isinstance(bits, int)

    def encode(tokens: Tensor, per_token: bool) -> tuple[Tensor, Tensor]:
        codes, unit = quantise(promote_to_fp32(tokens), per_token)
        return split_codes(codes, bits, split).high.to(torch.int8), unit

    q, q_unit = encode(x.q, True)
    if x.call.codes is None:
        k, k_unit = encode(x.k, mechanism.pattern.causal)
    else:
        k, k_unit = (expand_heads(each, x.heads) for each in x.call.codes)
    q, k, q_unit, k_unit = (each.flatten(0, 1).contiguous() for each in (q, k, x.scale * q_unit, k_unit.float()))
    return Codes(q, k, q_unit.squeeze(-1), k_unit.squeeze(-1), step=float(4 ** (8 - bits)))


def build_masks(x: Prepared) -> Masks:
    """Build the masks of a call without masks of pairs."""
    shown_q, shown_k = (
        None if shown is None else shown[:, None].expand(-1, x.heads, -1).flatten(0, 1).contiguous()
        for shown in (x.call.queries, x.call.keys)
    )
    return Masks(shown_q, shown_k, x.causal_shift)


def expand_thresholds(mechanism: Latte, x: Prepared) -> Tensor:
    """Return the threshold of each group, fp32 [g]."""
    return mechanism.thresholds.values().float().expand(x.batch, x.heads).flatten()


def find_common_type(x: Prepared) -> torch.dtype:
    """Find the type to which the tokens of a call are converted."""
    return functools.reduce(torch.promote_types, (each.dtype for each in (x.q, x.k, x.v)))


def choose_tile(x: Prepared) -> int:
    """Choose the number of keys in a tile."""
    return lists.choose_tile(find_common_type(x), (x.head_dim, x.value_dim))


def attend_to_lists(
    mechanism: Latte,
    x: Prepared,
    of_values: Tensor,
    masks: Masks,
    listed: Lists,
    size: int,
    codes: Codes | None,
    rows: Rows | None,
    transposed: Lists | None = None,
) -> Found:
    """Attend by the kernels, with the tail and the gradients of the gate that a mechanism has."""
    q, k, v = (each.to(find_common_type(x)).flatten(0, 1) for each in (x.q, x.k, x.v))
    tail = None
    factor = expand_factor(mechanism.tail, x, torch.float32)
    if factor is not None:
        of_k, of_v = (each.flatten(0, 1) for each in sum_visible_tokens(x))
        scores = (promote_to_fp32(q) * x.scale * of_k).sum(-1)
        seen = x.visible_keys.expand(x.batch, x.heads, -1).flatten(0, 1).int().contiguous()
        tail = Tail(factor, scores, of_v.contiguous(), seen)
    needs_slope = mechanism.needs_slope and mechanism.wants_gradient(x)
    setting = Setting(
        masks=masks,
        lists=listed,
        size=size,
        tile=choose_tile(x),
        codes=codes,
        rows=rows,
        transposed=transposed,
        scale=x.scale,
        always_keep=mechanism.always_keep,
        tau=mechanism.thresholds.tau.float() if needs_slope else None,
        into_scores=mechanism.gate.into_scores,
        value_trace=of_values.float().flatten(0, 1).contiguous(),
    )
    return attend(q, k, v, expand_thresholds(mechanism, x), tail, setting)


def read_output(found: Found, mechanism: Latte, x: Prepared) -> Tensor:
    """Return the outputs, [b, h, n, dv]; without a tail, rows that keep a value that is not finite are NaN."""
    out = found.out if mechanism.tail is not None else found.out + found.trace[..., None]
    return out.unflatten(0, (x.batch, x.heads))


def count_kept(found: Found, mechanism: Latte, x: Prepared) -> Tensor:
    """Return the number of kept pairs, with a gradient where thresholds are trained."""
    kept = found.kept.unflatten(0, (x.batch, x.heads))
    return kept if mechanism.thresholds.offset.requires_grad else kept.detach()
