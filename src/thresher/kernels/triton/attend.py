"""Attention over listed keys as a function that autograd differentiates, once."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from thresher.kernels.triton import lists
from thresher.kernels.triton.launch import interprets, launch
from thresher.kernels.triton.lists import Codes, Lists, Masks, Rows, choose_rows, describe_hidden, pad_width

MAX_EXCESS = 30.0  # of the mean score of dropped keys over the best kept one, in nats


class Tail(NamedTuple):
    """What a tail reads.

    Attributes:
        factor: What the weights of dropped keys are multiplied by, fp32 [g].
        scores: The sum of each query's visible scores, fp32 [g, n].
        values: The sum of the values that each query sees, fp32 [g, n, dv], or [g, 1, dv] if it is the same for all.
        seen: The number of visible keys, int32 [g, n].
    """

    factor: Tensor
    scores: Tensor
    values: Tensor
    seen: Tensor


class Setting(NamedTuple):
    """Which keys each row reads, and how the gate is trained.

    Attributes:
        masks: Visible pairs.
        lists: The keys of each block; where `transposed` is given, numbers of tiles of keys.
        size: Number of queries in a block; with tiles, in a tile.
        tile: Number of keys in a tile.
        codes: Codes, where rows choose for themselves; None where blocks vote.
        rows: Statistics of rows; None where blocks vote.
        transposed: The numbers of tiles of queries that read each tile of keys; None without tiles.
        scale: Factor that turns products of queries and keys into scores.
        always_keep: Number of leading keys that are kept where visible.
        tau: A third of the width of the gate's step, []; None if the gate has no gradient.
        into_scores: Whether that gradient reaches scores.
        value_trace: Traces of values, fp32 [g, m]; rows with a tail trace all that they see elsewhere.
    """

    masks: Masks
    lists: Lists
    size: int
    tile: int
    codes: Codes | None
    rows: Rows | None
    transposed: Lists | None
    scale: float
    always_keep: int
    tau: Tensor | None
    into_scores: bool
    value_trace: Tensor


class Found(NamedTuple):
    """What `attend` returns.

    Attributes:
        out: Outputs, fp32 [g, n, dv].
        kept: Number of kept pairs, fp32 [g], with the gate's gradient.
        of_rows: Those of each query, int32 [g, n].
        computed: Number of visible pairs of each query and its list, int32 [g, n].
        visited: Number of tiles of keys that each program read, int32 [g, programs].
        trace: The sum of the traces of the values that each query keeps, [g, n]; [g, 0] with a tail.
    """

    out: Tensor
    kept: Tensor
    of_rows: Tensor
    computed: Tensor
    visited: Tensor
    trace: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, threshold: Tensor, tail: Tail | None, setting: Setting) -> Found:
    """Attend to the listed keys.

    Args:
        q: Queries [g, n, d], fp32, fp16 or bf16.
        k: Keys [g, m, d], of the same type.
        v: Values [g, m, dv], of the same type.
        threshold: Thresholds, fp32 [g].
        tail: What a tail reads; None without one.
        setting: Which keys each row reads.
    """
    given = (None, None, None, None) if tail is None else tail
    return Found(*_Attend.apply(q.contiguous(), k.contiguous(), v.contiguous(), threshold, *given, setting))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        threshold: Tensor,
        factor: Tensor | None,
        scores: Tensor | None,
        values: Tensor | None,
        seen: Tensor | None,
        setting: Setting,
    ) -> tuple[Tensor, ...]:
        (g, n, _), dv = q.shape, v.shape[2]
        rows = choose_rows(setting.size, setting.tile)
        blocks, parts = setting.lists.counts.shape[1], -(-setting.size // rows)
        out, top, total = (q.new_empty(*shape, dtype=torch.float32) for shape in ((g, n, dv), (g, n), (g, n)))
        of_rows, computed, visited = (q.new_empty(g, number, dtype=torch.int32) for number in (n, n, blocks * parts))
        dropped = mean = raw = None
        trace = out.new_empty(g, n if factor is None else 0)
        if factor is not None:
            dropped, mean, raw = torch.empty_like(out), torch.empty_like(top), torch.empty_like(top)
        launch(
            "attend_lists",
            g * blocks * parts,
            q.device,
            factor=factor,
            score_total=scores,
            value_total=values,
            seen=seen,
            out=out,
            top_out=top,
            total_out=total,
            kept_out=of_rows,
            computed_out=computed,
            visited_out=visited,
            value_trace=setting.value_trace,
            trace_out=trace,
            dropped_out=dropped,
            mean_out=mean,
            tail_out=raw,
            index=setting.lists.entries,
            starts=setting.lists.starts,
            counts=setting.lists.counts,
            RUNNING=values is not None and values.shape[1] == n,
            parts=parts,
            **_describe(q, k, v, threshold, setting, factor is not None),
        )
        ctx.save_for_backward(q, k, v, threshold, out, top, total, of_rows, factor, seen, dropped, mean, raw)
        ctx.setting, ctx.parts = setting, parts
        ctx.running = values is not None and values.shape[1] == n
        ctx.mark_non_differentiable(of_rows, computed, visited, trace)
        return out, of_rows.sum(-1).float(), of_rows, computed, visited, trace

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_kept: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, threshold, out, top, total, of_rows, factor, seen, dropped, mean, raw = ctx.saved_tensors
        setting: Setting = ctx.setting
        inner = (grad * out).sum(-1)
        grad = grad.to(v.dtype).contiguous()
        of_factor = of_values = tail = share = None
        if factor is not None:
            number = seen - of_rows
            plain = raw / total
            tail = plain * factor[:, None]
            reach = (grad * dropped).sum(-1) - number * inner
            of_factor = (plain * reach).sum(-1)
            share = (tail * reach / number.clamp_min(1)).masked_fill(mean - top > MAX_EXCESS, 0)
            of_values = grad * tail[..., None] if ctx.running else tail[:, None] @ grad.float()
        more = {"top": top, "total": total, "inner": inner, "tail": tail, "share": share, "mean": mean}
        slope = setting.tau is not None
        more |= {"grad": grad, "tau_in": setting.tau, "SLOPE": slope, "INTO_SCORES": slope and setting.into_scores}
        more |= _describe(q, k, v, threshold, setting, factor is not None)
        of_q, of_k, of_v, of_threshold = _launch_backward(ctx, q, k, v, grad_kept, more)
        given = [x.to(q.dtype) for x in (of_q, of_k, of_v)]
        return *given, of_threshold, of_factor, share, of_values, None, None


def _launch_backward(
    ctx: Any, q: Tensor, k: Tensor, v: Tensor, grad_kept: Tensor, more: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    setting: Setting = ctx.setting
    tiles, g = setting.transposed, len(k)
    of_q = torch.empty_like(q, dtype=torch.float32)
    of_k, of_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    programs = setting.lists.counts.shape[1] * ctx.parts
    of_threshold = of_q.new_empty(g, programs) if setting.tau is not None else None
    launch(
        "back_lists",
        g * programs,
        q.device,
        grad_kept_in=grad_kept.float().contiguous(),
        differences=setting.lists.differences,
        grad_q=of_q,
        grad_k=None if tiles is not None else of_k,
        grad_v=None if tiles is not None else of_v,
        grad_threshold=of_threshold,
        index=setting.lists.entries,
        starts=setting.lists.starts,
        counts=setting.lists.counts,
        parts=ctx.parts,
        **more,
    )
    if tiles is not None:
        for name in ("TILES", "GATED", "size", "blocks"):
            del more[name]
        number = tiles.counts.shape[1]
        launch(
            "back_tiles",
            g * number,
            q.device,
            grad_k=of_k,
            grad_v=of_v,
            index=tiles.entries,
            starts=tiles.starts,
            counts=tiles.counts,
            tiles=number,
            **more,
        )
    return of_q, of_k, of_v, None if of_threshold is None else of_threshold.sum(-1)


def _describe(q: Tensor, k: Tensor, v: Tensor, threshold: Tensor, setting: Setting, tail: bool) -> dict[str, Any]:
    """List the arguments that forward and backward share."""
    (_, n, d), m, dv = q.shape, k.shape[1], v.shape[2]
    codes, rows, masks = setting.codes, setting.rows, setting.masks
    bf16 = q.dtype == torch.bfloat16
    rough = q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return {
        "q": q,
        "k": k,
        "v": v,
        "threshold": threshold,
        "scale": setting.scale,
        "q_codes": codes and codes.q,
        "q_units": codes and codes.q_unit,
        "k_codes": codes and codes.k,
        "k_units": codes and codes.k_unit,
        "best_in": rows and rows.best,
        "unit_in": rows and rows.unit,
        "step": 1.0 if codes is None else codes.step,
        "n": n,
        "m": m,
        "shift": masks.shift or 0,
        "size": setting.size,
        "blocks": setting.lists.counts.shape[1],
        "always_keep": setting.always_keep,
        "D": d,
        "DV": dv,
        "PADDED": pad_width(d),
        "PADDED_V": pad_width(dv),
        "PADDED_C": pad_width(d, lists.LEAST_CODES),
        "ROWS": choose_rows(setting.size, setting.tile),
        "KEYS": setting.tile,
        "TILES": setting.transposed is not None,
        "GATED": codes is not None,
        "CAUSAL": masks.shift is not None,
        "PER_KEY": codes is not None and codes.k_unit.shape[1] > 1,
        "SPREAD": rows is not None and rows.unit is not None,
        "TAIL": tail,
        "PRECISION": "tf32" if rough else "ieee",
        "UPCAST": bf16 and interprets(),
        **describe_hidden(masks),
    }
