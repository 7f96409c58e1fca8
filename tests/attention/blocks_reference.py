"""Blocks by their definition: loops over examples, heads and blocks, in fp64 and without the code under test."""

import torch
from torch import Tensor

from thresher.attention import Call
from thresher.attention.blocks import Blocks
from thresher.attention.shared.functional import expand_heads
from thresher.testing.inputs import Inputs, noise_like

LEAST = 1e-30


def attend_by_definition(mechanism: Blocks, inputs: Inputs, call: Call) -> dict[str, Tensor]:
    """Compute outputs, kept pairs, MACs and gradients, block by block; a row that chooses alone is a block of one."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.leaves().items()}
    leaves["thresholds.offset"] = mechanism.thresholds.offset.detach().clone().requires_grad_()
    if mechanism.tail is not None:
        leaves["tail.factor"] = mechanism.tail.factor.detach().clone().requires_grad_()
    visible = mechanism.visible(inputs.q, inputs.k, call)
    k, v = (expand_heads(leaves[name], mechanism.num_heads) for name in "kv")
    scores = leaves["q"] @ k.mT * 8**-0.5 + (0 if call.bias is None else call.bias)
    (b, h, n, m), block = scores.shape, mechanism.block
    size = block.queries if mechanism.votes else 1
    tile = torch.arange(m) // block.keys
    always = tile < -(-mechanism.always_keep // block.keys)
    voting_heads = {head: [head] for head in range(h)}
    if block.heads == "shared":
        of_group = h // inputs.k.shape[1]
        voting_heads = {i: list(range(i - i % of_group, i - i % of_group + of_group)) for i in range(h)}
    is_chosen = torch.zeros(b, h, n, m, dtype=torch.bool)
    out, kept = torch.zeros(b, h, n, v.shape[-1], dtype=torch.float64), torch.zeros(b, h)
    estimated, unscored = torch.zeros(b, h), torch.zeros(b, h)
    into_theta, through_gates = torch.zeros(h, dtype=torch.float64), []
    rows = torch.empty_like(out)
    for e in range(b):
        for head in range(h):
            theta = float(mechanism.thresholds.values()[head].detach())
            for start in range(0, n, size):
                part = slice(start, min(start + size, n))
                shown, some = visible[e, head, part], scores[e, head, part]
                seeing = shown.any(-1).nonzero().flatten()
                if not len(seeing):
                    continue
                shares, known = [], torch.zeros(int(tile[-1]) + 1, dtype=torch.bool)
                for voting in voting_heads[head]:
                    of_head = visible[e, voting, part]
                    for row in of_head.any(-1).nonzero().flatten()[:: block.every]:
                        each = scores[e, voting, part][row].masked_fill(~of_head[row], float("-inf")).softmax(-1)
                        shares.append(torch.stack([each[tile == t].sum() for t in range(len(known))]))
                    known |= torch.stack([of_head[:, tile == t].any() for t in range(len(known))])
                voters = seeing[:: block.every]
                logs = torch.stack(shares).mean(0).clamp_min(LEAST).log()
                best = logs.detach()[known].max()
                unit = torch.tensor(1.0)
                if mechanism.unit == "spread":
                    unit = (best - logs.detach()[known].mean()).clamp_min(torch.finfo(torch.float64).eps)
                difference = ((best - logs.detach()) / unit)[tile]
                keep = (difference <= theta) | always
                if block.top:
                    order = logs.detach().masked_fill(~known, -9e9).argsort(descending=True)
                    keep = torch.isin(tile, order[: block.top]) | always
                own = torch.zeros_like(shown)
                if call.pairs is not None and (mechanism.votes or block.heads == "shared"):
                    favourite = some.masked_fill(~shown, float("-inf")).argmax(-1)
                    own = (tile == tile[favourite][:, None]) & shown.any(-1, keepdim=True)
                keep = (keep | own) & shown
                is_chosen[e, head, part] = keep
                gate = keep.double().requires_grad_()
                weights = gate * (some - some.detach().amax()).exp()
                if mechanism.tail is not None:
                    dropped = shown.double() - gate
                    count = dropped.sum(-1, keepdim=True)
                    mean = (some * dropped).sum(-1, keepdim=True) / torch.where(count > 0.5, count, 1)
                    tail = leaves["tail.factor"][head] * (mean - some.detach().amax()).exp() * (count > 0.5)
                    weights = weights + dropped * tail
                total = weights.sum(-1, keepdim=True)
                found = (weights / torch.where(total > 0, total, 1)) @ v[e, head]
                out = out.clone()
                out[e, head, part] = found
                wanted = noise_like(rows)[e, head, part]
                (of_gate,) = torch.autograd.grad((found * wanted).sum(), gate, retain_graph=True)
                margin = theta - difference
                slope = 1.5 * (1 - (margin / (3 * mechanism.thresholds.tau)) ** 2) / (3 * mechanism.thresholds.tau)
                slope = slope.masked_fill((margin < 0) | (margin > 3 * mechanism.thresholds.tau), 0)
                fixed = own | always | ~shown
                reached = (of_gate * slope).masked_fill(fixed, 0)
                into_theta[head] += reached.sum()
                if mechanism.gate.into_scores:
                    through_gates.append((logs[tile] * reached.sum(0) / unit.clamp_min(1)).sum())
                kept[e, head] += keep.sum()
                estimated[e, head] += shown[voters].sum()
                unscored[e, head] += keep.sum() - keep[voters].sum()
    loss = (out * noise_like(rows)).sum() + sum(through_gates, torch.zeros((), dtype=torch.float64))
    names = [name for name in leaves if name != "thresholds.offset"]
    grads = dict(zip(names, torch.autograd.grad(loss, [leaves[name] for name in names]), strict=True))
    share = mechanism.estimate.share
    union = torch.zeros(b, h)
    for start in range(0, n, block.queries):
        part = slice(start, start + block.queries)
        union += (is_chosen[:, :, part].any(2, keepdim=True) & visible[:, :, part]).sum((-2, -1))
    computed = kept if mechanism.votes else union
    macs = estimated * 8 * share + computed * 8 * (1 - share) + unscored * 8 * share
    return {"out": out.detach(), "kept": kept, "macs": macs, "thresholds.offset": into_theta, **grads}
