"""Tiles ranked by pooled keys: MoBA and the learned gate against their definitions in loops, in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from thresher.attention import Call, Pattern
from thresher.attention.blocks import Blocks
from thresher.attention.blocks.gate import LOSS
from thresher.attention.blocks.tiles import average_keys, average_tiles
from thresher.attention.shared.functional import expand_heads
from thresher.testing.inputs import Inputs, attend, draw, first, gradients, last, noise_like, padded

SELF, CAUSAL, CROSS = Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_CROSS
EXACT: dict[str, Any] = {"estimate": {"bits": "exact"}}
HARD: dict[str, Any] = {"gate": {"mode": "hard"}}


def attend_by_moba(
    q: Tensor, k: Tensor, v: Tensor, shown: Tensor, causal: bool, size: int, top: int
) -> tuple[Tensor, Tensor, int]:
    """Compute MoBA row by row (arXiv 2502.13189): outputs, kept pairs of a head, and the number of tile scores.

    A row attends to its own tile, up to itself where causal, and to the past tiles whose mean key has the largest
    product with the query; `top` counts both.
    """
    (b, h, n, d), m = q.shape, k.shape[2]
    rows, kept, ranked = [], torch.zeros(b, h), 0
    for e in range(b):
        for head in range(h):
            for i in range(n):
                at = i + m - n
                seen = [j for j in range(at + 1 if causal else m) if shown[e, j]]
                tiles: dict[int, list[int]] = {}
                for j in seen:
                    tiles.setdefault(j // size, []).append(j)
                ranked += len(tiles)
                gate = {t: float((q[e, head, i] @ k[e, head, js].mean(0)).detach()) for t, js in tiles.items()}
                if at // size in gate:
                    gate[at // size] = float("inf")
                best = sorted(gate, key=lambda t: -gate[t])[:top]
                chosen = [j for t in best for j in tiles[t]]
                kept[e, head] += len(chosen)
                if chosen and shown[e, at]:
                    weights = (q[e, head, i] @ k[e, head, chosen].T * d**-0.5).softmax(-1)
                    rows.append(weights @ v[e, head, chosen])
                else:
                    rows.append(torch.zeros_like(v[e, head, 0]))
    return torch.stack(rows).view(b, h, n, -1), kept, ranked


@pytest.mark.parametrize("pattern", [CAUSAL, SELF])
@pytest.mark.parametrize("top", [1, 2, 3])
def test_pooled_keys_and_a_number_of_tiles_are_moba(pattern: Pattern, top: int) -> None:
    options = {"block": {"keys": 4, "rank": "pooled", "top": top, "queries": 5}, **EXACT, **HARD}
    mechanism = Blocks(4, 8, pattern, tail="none", backend="reference", **options).double()
    inputs = draw(mechanism, lengths=(23, 23), groups=2, value_dim=5, spread=1.3)
    for call in (Call(), padded(pattern, lengths=(23, 23)), padded(pattern, lengths=(23, 23), left=True)):
        shown = torch.ones(2, 23, dtype=torch.bool) if call.keys is None else call.keys
        leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.leaves().items()}
        k, v = (expand_heads(leaves[name], 4) for name in "kv")
        wanted, kept, ranked = attend_by_moba(leaves["q"], k, v, shown, pattern.causal, 4, top)
        (got, found) = gradients(mechanism, inputs, call, cost=0)
        torch.testing.assert_close(got.out, wanted, rtol=1e-12, atol=1e-12)
        (wanted * noise_like(wanted)).sum().backward()
        for name, x in leaves.items():
            torch.testing.assert_close(found[name], x.grad, rtol=1e-10, atol=1e-12)
        if call.queries is None:
            assert torch.equal(got.cost.kept, kept)
            assert float(got.cost.select.sum()) == 8 * ranked
    if pattern is CAUSAL:
        decoded = mechanism(inputs.q[:, :, -1:], inputs.k, inputs.v, Call()).out
        whole = mechanism(inputs.q, inputs.k, inputs.v, Call()).out
        torch.testing.assert_close(decoded, whole[:, :, -1:], rtol=1e-12, atol=1e-12)


def test_a_row_of_moba_keeps_its_own_tile_first() -> None:
    """Queries that point away from the keys of their own tile keep it all the same, and nothing else with one tile."""
    block = {"keys": 2, "rank": "pooled", "top": 1}
    mechanism = Blocks(1, 2, CAUSAL, block=block, tail="none", **EXACT, **HARD).double()
    k = torch.tensor([[9.0, 0.0], [9.0, 0.0], [-9.0, 0.0], [-9.0, 0.0]], dtype=torch.float64)[None, None]
    q, v = torch.ones_like(k), torch.arange(8, dtype=torch.float64).view(1, 1, 4, 2)
    out = attend(mechanism, Inputs(q, k, v, None)).out
    torch.testing.assert_close(out[0, 0, 2], v[0, 0, 2])
    torch.testing.assert_close(out[0, 0, 3], v[0, 0, 2:].mean(0))


@pytest.mark.parametrize(("pattern", "n", "m"), [(SELF, 23, 23), (CROSS, 13, 22), (CAUSAL, 17, 17), (CAUSAL, 6, 19)])
def test_products_with_mean_keys_are_means_of_products(pattern: Pattern, n: int, m: int) -> None:
    mechanism = Blocks(2, 8, pattern).double()
    inputs = draw(mechanism, lengths=(n, m))
    for call in (Call(), Call(keys=first([m, 9], m)), Call(keys=last([m - 1, 7], m), queries=first([n - 1, n], n))):
        x = mechanism.prepare(inputs.q, inputs.k, inputs.v, call)
        wanted, seen = average_tiles(x.q @ x.k.mT, x, 4)
        got, of_got = average_keys(x.q, x.k, x, 4)
        seen = seen.expand_as(wanted)
        assert torch.equal(of_got.expand_as(wanted), seen)
        torch.testing.assert_close(got[seen], wanted[seen], rtol=1e-12, atol=1e-12)


def learned(pattern: Pattern, **options: Any) -> Blocks:
    block = {"keys": 4, "rank": "learned", "queries": 5, **options.pop("block", {})}
    built = Blocks(3, 8, pattern, block=block, unit="nats", threshold=0.5, **EXACT, **options).double()
    assert built.tile_gate is not None
    with torch.no_grad():
        for parameter in built.tile_gate.parameters():
            parameter.add_(0.3 * noise_like(parameter))
    return built


def pool_by_definition(mechanism: Blocks, inputs: Inputs, call: Call) -> tuple[list[Tensor], Tensor]:
    """Return the logits of the tiles that each block or row sees, and the loss of each example and head."""
    gate, visible = mechanism.tile_gate, mechanism.visible(inputs.q, inputs.k, call)
    assert gate is not None
    (b, h, n, d), m = inputs.q.shape, inputs.k.shape[2]
    size = mechanism.block.queries if mechanism.votes else 1
    logits, losses = [], torch.zeros(b, h, dtype=torch.float64)
    for e in range(b):
        for head in range(h):
            each = []
            for start in range(0, n, size):
                rows = [i for i in range(start, min(start + size, n)) if visible[e, head, i].any()]
                if not rows:
                    continue
                keys = [j for j in range(m) if visible[e, head, rows[-1], j]]  # padding and causality, no other mask
                q = inputs.q[e, head, rows].mean(0) @ gate.of_queries[head]
                tiles = sorted({j // 4 for j in keys})
                of_tile = [[j for j in keys if j // 4 == t] for t in tiles]
                pooled = torch.stack([inputs.k[e, head, js].mean(0) @ gate.of_keys[head] for js in of_tile])
                found = pooled @ q * d**-0.5
                logits.append(found)
                scores = inputs.q[e, head, rows] @ inputs.k[e, head].T * d**-0.5
                shares = scores.masked_fill(~visible[e, head, rows], float("-inf")).softmax(-1)
                most = torch.stack([shares[:, js].max() for js in of_tile])
                wanted = most / most.sum()
                each.append((wanted * (wanted.log() - found.log_softmax(-1))).sum())
            losses[e, head] = torch.stack(each).mean()
    return logits, losses


@pytest.mark.parametrize(
    ("pattern", "n", "m"), [(SELF, 23, 23), (CROSS, 13, 22), (CAUSAL, 17, 17), (Pattern.CAUSAL_CROSS, 9, 14)], ids=str
)
def test_a_learned_gate_pools_and_learns_as_defined(pattern: Pattern, n: int, m: int) -> None:
    mechanism = learned(pattern, backend="reference")
    assert mechanism.tile_gate is not None
    parameters = list(mechanism.tile_gate.parameters())
    inputs = draw(mechanism, lengths=(n, m), spread=1.3)
    for call in (Call(), padded(pattern, lengths=(n, m)), padded(pattern, lengths=(n, m), left=True)):
        fresh = inputs.fresh()
        attended = attend(mechanism, fresh, call)
        logits, wanted = pool_by_definition(mechanism, inputs, call)
        torch.testing.assert_close(attended.losses[LOSS], wanted, rtol=1e-10, atol=1e-12)
        assert wanted.min() > 0
        got = torch.autograd.grad(attended.losses[LOSS].sum(), [*parameters, fresh.q, fresh.k], allow_unused=True)
        assert got[2] is None, "tokens learn nothing from this loss"
        assert got[3] is None
        for one, other in zip(got, torch.autograd.grad(wanted.sum(), parameters), strict=False):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            x = mechanism.prepare(inputs.q, inputs.k, inputs.v, call)
            difference = mechanism.compare(x)[1]
        size, number = (5 if mechanism.votes else 1), 0
        for e, head in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
            for start in range(0, n, size):
                seen = mechanism.visible(inputs.q, inputs.k, call)[e, head, start : start + size]
                if seen.any():
                    row, some = int(seen.any(-1).nonzero()[-1]), seen.any(0)
                    own = difference[e, head, start + row, some]
                    tile = torch.arange(m)[some] // 4
                    expected = (logits[number].max() - logits[number])[tile.unique(return_inverse=True)[1]]
                    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)
                    number += 1
        assert number == len(logits)


def test_the_loss_exists_where_the_gate_can_learn() -> None:
    mechanism = learned(SELF)
    inputs = draw(mechanism, lengths=(9, 9))
    assert set(attend(mechanism, inputs).losses) == {LOSS} == set(mechanism.auxiliary)
    with torch.no_grad():
        assert not attend(mechanism, inputs).losses
    assert mechanism.tile_gate is not None
    assert not attend(mechanism.requires_grad_(False), inputs).losses
    assert not Blocks(2, 8, SELF).auxiliary


def test_a_gate_learns_where_attention_goes() -> None:
    """From projections that point elsewhere, on keys that differ more between tiles than within."""
    torch.manual_seed(0)
    mechanism = Blocks(2, 8, SELF, block={"keys": 4, "rank": "learned", "queries": 1, "top": 2}, **EXACT, **HARD)
    assert mechanism.tile_gate is not None
    with torch.no_grad():
        for parameter in mechanism.tile_gate.parameters():
            parameter.copy_(torch.randn_like(parameter) / 8**0.5)
    optimizer = torch.optim.Adam(mechanism.tile_gate.parameters(), lr=0.03)
    seen = []
    for _ in range(150):
        k = torch.randn(8, 2, 8, 8).repeat_interleave(4, 2) + 0.3 * torch.randn(8, 2, 32, 8)
        q = 2 * torch.randn(8, 2, 32, 8)
        loss = mechanism(q, k, k, Call()).losses[LOSS].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert sum(seen[-20:]) < 0.2 * sum(seen[:20])


def test_gathering_leaves_the_loss_to_the_reference() -> None:
    mechanism = learned(SELF, backend="gather")
    inputs = draw(mechanism, lengths=(9, 9))
    with pytest.raises(ValueError, match=r"block\.rank=learned needs a map of all pairs"):
        attend(mechanism, inputs)
    with torch.no_grad():
        got = attend(mechanism.eval(), inputs)
        torch.testing.assert_close(got.out, attend(learned(SELF, backend="reference").eval(), inputs).out)
