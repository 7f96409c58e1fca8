"""Inputs for mechanisms, ways to disturb them, and the definition of visibility, pair by pair."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from thresher.attention import Attended, Call, Mechanism, Pattern, ValueSource

MILD, SHARP = 1.0, 3.0


@dataclass(frozen=True)
class Inputs:
    """Inputs of a mechanism; `source` is the source of v, if the mechanism needs it."""

    q: Tensor
    k: Tensor
    v: Tensor
    source: ValueSource | None = None

    def leaves(self) -> dict[str, Tensor]:
        """List the tensors that get gradients."""
        if self.source is None:
            return {"q": self.q, "k": self.k, "v": self.v}
        return {"q": self.q, "k": self.k, "x": self.source.x, "weight": self.source.weight}

    def fresh(self) -> "Inputs":
        """Return the same values as leaves of a new graph."""
        return self.with_leaves({name: x.detach().requires_grad_() for name, x in self.leaves().items()})

    def first(self, n: int) -> "Inputs":
        """Return the first n tokens."""
        source = self.source and self.source._replace(x=self.source.x[:, :n])
        return Inputs(self.q[:, :, :n], self.k[:, :, :n], self.v[:, :, :n], source)

    def with_leaves(self, leaves: dict[str, Tensor]) -> "Inputs":
        """Rebuild the inputs from other leaves."""
        if self.source is None:
            return Inputs(leaves["q"], leaves["k"], leaves["v"])
        source = ValueSource(leaves["x"], leaves["weight"], self.source.bias)
        return Inputs(leaves["q"], leaves["k"], project_values(source, self.v.shape[1]), source)


def choose_lengths(pattern: Pattern) -> tuple[int, int]:
    """Choose numbers of queries and keys: odd in self attention, different in cross attention."""
    return (5, 8) if pattern.cross else (7, 7)


def draw(
    mechanism: Mechanism,
    *,
    batch: int = 2,
    lengths: tuple[int, int] | None = None,
    groups: int | None = None,
    value_dim: int | None = None,
    spread: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Inputs:
    """Draw inputs for a mechanism; scores have a standard deviation of about `spread` squared."""
    n, m = lengths or choose_lengths(mechanism.pattern)
    h, d, hk = mechanism.num_heads, mechanism.head_dim, groups or mechanism.num_heads
    dv = value_dim or d
    rng = torch.Generator().manual_seed(seed)
    shapes = (batch, h, n, d), (batch, hk, m, d), (batch, hk, m, dv)
    q, k, v = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)
    q, k = q * spread, k * spread
    if not mechanism.needs_source:
        return Inputs(q.to(dtype), k.to(dtype), v.to(dtype))
    x = torch.randn(batch, m, hk * dv, generator=rng, dtype=torch.float64).to(dtype)
    weight = torch.randn(hk * dv, hk * dv, generator=rng, dtype=torch.float64).to(dtype) / (hk * dv) ** 0.5
    source = ValueSource(x, weight, None)
    return Inputs(q.to(dtype), k.to(dtype), project_values(source, hk), source)


def project_values(source: ValueSource, heads: int) -> Tensor:
    """Project a source to values, [b, heads, m, dv]."""
    return F.linear(*source).unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(mechanism: Mechanism, inputs: Inputs, call: Call | None = None, seed: int = 0) -> Attended:
    """Call a mechanism after seeding the global generator."""
    torch.manual_seed(seed)
    return mechanism(inputs.q, inputs.k, inputs.v, replace(call or Call(), source=inputs.source))


def gradients(
    mechanism: Any, inputs: Inputs, call: Call | None = None, *, cost: float = 1.0
) -> tuple[Attended, dict[str, Tensor | None]]:
    """Compute the result and the gradients of a random loss, plus `cost` times the total cost and auxiliary losses.

    Gradients are those of the leaves, the bias and every trainable parameter, by name.
    """
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.leaves().items()}
    call = call or Call()
    variables = dict(leaves)
    if call.bias is not None:
        variables["bias"] = call.bias.detach().clone().requires_grad_()
        call = replace(call, bias=variables["bias"])
    variables |= {name: p for name, p in mechanism.named_parameters() if p.requires_grad}
    attended = attend(mechanism, inputs.with_leaves(leaves), call)
    loss = (attended.out * noise_like(attended.out)).sum()
    if cost:
        loss = loss + cost * attended.cost.total.sum()
        for each in attended.losses.values():
            loss = loss + cost * each.sum()
    if not loss.requires_grad:
        return attended, dict.fromkeys(variables)
    found = torch.autograd.grad(loss, list(variables.values()), allow_unused=True)
    return attended, dict(zip(variables, found, strict=True))


def noise_like(x: Tensor, size: float = 1.0, seed: int = 7) -> Tensor:
    """Return Gaussian noise of the type and on the device of x; its values depend on the shape and the seed only."""
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(x.shape, generator=rng, dtype=torch.float64) * size).to(x)


def disturb(inputs: Inputs, queries: Tensor, keys: Tensor, size: float) -> Inputs:
    """Replace the marked queries [b, h, n] and keys [b, hk, m] by noise of this size, or by NaN if `size` is NaN."""

    def replaced(x: Tensor, where: Tensor, seed: int) -> Tensor:
        content = noise_like(x, size, seed) if size == size else torch.full_like(x, size)
        return torch.where(where[..., None], content, x)

    q, k = replaced(inputs.q, queries, 11), replaced(inputs.k, keys, 12)
    if inputs.source is None:
        return Inputs(q, k, replaced(inputs.v, keys, 13))
    source = inputs.source._replace(x=replaced(inputs.source.x, keys.all(1), 14))
    return Inputs(q, k, project_values(source, k.shape[1]), source)


def visible_by_definition(mechanism: Mechanism, inputs: Inputs, call: Call) -> Tensor:
    """Build the mask of visible pairs [b, h, n, m] by the definition of the contract."""
    (b, h, n, _), m = inputs.q.shape, inputs.k.shape[2]
    device = inputs.q.device
    visible = torch.ones(b, h, n, m, dtype=torch.bool, device=device)
    if mechanism.pattern is Pattern.CAUSAL_SELF:
        visible &= torch.arange(m, device=device)[None, :] <= torch.arange(n, device=device)[:, None] + (m - n)
    if call.queries is not None:
        visible &= call.queries[:, None, :, None]
    if call.keys is not None:
        visible &= call.keys[:, None, None, :]
    if call.pairs is not None:
        visible &= call.pairs
    return visible


def first(lengths: list[int], total: int) -> Tensor:
    """Build a mask [b, total], True for the first tokens of each example."""
    return torch.arange(total)[None, :] < torch.tensor(lengths)[:, None]


def last(lengths: list[int], total: int) -> Tensor:
    """Build a mask [b, total], True for the last tokens of each example: padding on the left."""
    return first(lengths, total).flip(1)


def padded(pattern: Pattern, batch: int = 2, lengths: tuple[int, int] | None = None, left: bool = False) -> Call:
    """Build padding that differs between examples, and in cross attention between queries and keys."""
    n, m = lengths or choose_lengths(pattern)
    side = last if left else first
    keys = side([m - 1 - 2 * i % m for i in range(batch)], m)
    return Call(queries=side([n - 2 * (i + 1) % n for i in range(batch)], n) if pattern.cross else keys, keys=keys)


def convert_to_pairs(call: Call) -> Call:
    """Convert padding to a mask of pairs."""
    assert call.queries is not None
    assert call.keys is not None
    return Call(pairs=(call.queries[:, :, None] & call.keys[:, None, :])[:, None])


def masks(mechanism: Mechanism) -> Iterator[Call]:
    """Generate padding of every kind: right, left and scattered, of queries or keys or both, by tokens and by pairs."""
    n, m = choose_lengths(mechanism.pattern)
    right, left = padded(mechanism.pattern), padded(mechanism.pattern, left=True)
    yield from (
        right,
        left,
        convert_to_pairs(right),
        Call(queries=right.queries),
        Call(keys=right.keys),
        Call(keys=left.keys),
    )
    holes = torch.ones(2, m, dtype=torch.bool)
    holes[0, [0, 3]] = holes[1, m - 2] = False
    yield Call(keys=holes)
    by_head = torch.ones(2, mechanism.num_heads, n, m, dtype=torch.bool)
    by_head[0, 0, :, 2] = by_head[1, -1, 1, :] = by_head[1, 0, :, 0] = by_head[0, -1, 2, 3:] = False
    yield Call(pairs=by_head)


def generate_masks_with_empty_rows(mechanism: Mechanism) -> Iterator[Call]:
    n, m = choose_lengths(mechanism.pattern)
    yield Call(keys=first([0, m], m))
    yield Call(queries=first([n, 0], n))
    one_row = torch.ones(1, 1, n, m, dtype=torch.bool)
    one_row[..., 2, :] = False
    yield Call(pairs=one_row)


def softmax_attention(mechanism: Mechanism, inputs: Inputs, call: Call) -> dict[str, Tensor]:
    """Compute the output and gradients of PyTorch attention, for comparison with `gradients(cost=0)`."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.leaves().items()}
    rebuilt = inputs.with_leaves(leaves)
    variables = dict(leaves)
    visible = visible_by_definition(mechanism, inputs, call)
    seen = visible.any(-1, keepdim=True)
    mask = visible | ~seen
    if call.bias is not None:
        variables["bias"] = call.bias.detach().clone().requires_grad_()
        mask = torch.where(mask, variables["bias"], -torch.inf)
    repeats = mechanism.num_heads // rebuilt.k.shape[1]
    k, v = rebuilt.k.repeat_interleave(repeats, 1), rebuilt.v.repeat_interleave(repeats, 1)
    out = torch.where(seen, F.scaled_dot_product_attention(rebuilt.q, k, v, attn_mask=mask), 0)
    found = torch.autograd.grad((out * noise_like(out)).sum(), list(variables.values()))
    return {"out": out, **dict(zip(variables, found, strict=True))}


def same(one: Attended, other: Attended) -> bool:
    pairs = zip(list_results(one).values(), list_results(other).values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def list_results(attended: Attended) -> dict[str, Tensor]:
    """List the output, the parts of the cost and the auxiliary losses of a call, by name."""
    costs = {f"cost.{name}": part for name, part in attended.cost._asdict().items()}
    return {"out": attended.out, **costs, **{f"losses.{name}": each for name, each in attended.losses.items()}}


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return inputs.with_leaves({name: x.to(dtype) for name, x in inputs.leaves().items()})


def cast_bias(call: Call, dtype: torch.dtype) -> Call:
    return call if call.bias is None else replace(call, bias=call.bias.to(dtype))


def count_saved_bytes(mechanism: Mechanism, n: int) -> int:
    """Count the bytes that a call on n tokens saves for backward, each storage once."""
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    q, k, v = (torch.randn(1, mechanism.num_heads, n, mechanism.head_dim, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept_alive = mechanism(q, k, v, Call())
    assert kept_alive.out.requires_grad
    return sum(seen.values())
