"""Calls of mechanisms drawn at random: shapes, masks and options, and which of them are to be refused."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from thresher.attention import Call, Mechanism, Pattern, find
from thresher.attention.options import nest_options
from thresher.attention.yoso.hashing import find_hadamard_width
from thresher.testing.inputs import Inputs, draw


def name_case(x: object) -> str:
    """Name one parameter of a test for its id."""
    return getattr(x, "__name__", str(x))


FLAGS = st.booleans()
BACKENDS = st.sampled_from(["auto", "reference"])  # cpu is auto, but refuses what the kernel cannot do
RESAMPLE = st.sampled_from(["forward", "never"])
SHARES = st.floats(0, 1, exclude_min=True)
TAILS = st.sampled_from(["none", "mean"])
OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "dense": {},
    "mean": {},
    "none": {},
    "topk": {
        "keys": st.one_of(st.integers(1, 20), SHARES),
        "tail": TAILS,
        "per_head": FLAGS,
        "chunk": st.integers(1, 12),
        "backend": BACKENDS,
    },
    "latte": {
        "estimate.bits": st.sampled_from([2, 4, 8, "exact"]),
        "estimate.split": st.sampled_from(["round", "truncate"]),
        "estimate.scoring": st.sampled_from(["exact", "int8"]),
        "gate.mode": st.sampled_from(["ste", "soft", "hard"]),
        "gate.surrogate": st.sampled_from(["sigmoid", "compact", "inside"]),
        "gate.tau": st.floats(0.01, 10),
        "gate.into_scores": FLAGS,
        "unit": st.sampled_from(["spread", "nats"]),
        "threshold": st.one_of(st.just(float("inf")), st.floats(0, 20)),
        "trainable": FLAGS,
        "always_keep": st.integers(0, 12),
        "tail": TAILS,
        "backend": BACKENDS,
    },
    "blocks": {
        "block.queries": st.integers(1, 12),
        "block.keys": st.sampled_from([1, 2, 3]),
        "block.share": st.sampled_from(["auto", "vote", "union"]),
        "block.every": st.integers(1, 4),
        "block.heads": st.sampled_from(["own", "own", "shared"]),
        "block.rank": st.sampled_from(["votes", "votes", "votes", "pooled", "learned"]),
        "block.top": st.sampled_from([0, 0, 0, 2]),
        "estimate.bits": st.sampled_from([2, 4, 8, "exact"]),
        "estimate.split": st.sampled_from(["round", "truncate"]),
        "estimate.scoring": st.sampled_from(["exact", "int8"]),
        "gate.mode": st.sampled_from(["ste", "hard"]),
        "gate.surrogate": st.sampled_from(["sigmoid", "compact", "inside"]),
        "gate.tau": st.floats(0.01, 10),
        "gate.into_scores": FLAGS,
        "unit": st.sampled_from(["spread", "nats"]),
        "threshold": st.one_of(st.just(float("inf")), st.floats(0, 20)),
        "always_keep": st.integers(0, 12),
        "tail": TAILS,
        "backend": BACKENDS,
    },
    "smyrf": {
        "cluster": st.integers(1, 12),
        "rounds": st.integers(1, 4),
        "dedup": st.sampled_from(["none", "count"]),
        "tail": TAILS,
        "quantise": FLAGS,
        "width": st.floats(0.01, 100),
        "resample": RESAMPLE,
        "backend": BACKENDS,
    },
    "yoso": {
        "hashes": st.integers(1, 9),
        "hash.bits": st.integers(0, 8),
        "expectation": FLAGS,
        "grad": st.sampled_from(["bound", "exact"]),
        "hash.kind": st.sampled_from(["gaussian", "hadamard"]),
        "conv": st.sampled_from([0, 0, 1, 3, 9]),
        "dense_below": st.sampled_from([0, 4, 1024]),
        "hash.resample": RESAMPLE,
        "backend": BACKENDS,
    },
    "mca": {
        "alpha": st.one_of(st.just(0.0), st.floats(0, 4)),
        "sampling.distribution": st.sampled_from(["multinomial", "poisson"]),
        "grad": st.sampled_from(["sampled", "exact"]),
        "sampling.draws": st.sampled_from(["token", "shared"]),
        "path": st.sampled_from(["dense", "gather"]),
        "reproduce_paper": FLAGS,
        "allow_noncausal_budget": FLAGS,
        "sampling.resample": RESAMPLE,
        "sampling.seed": st.integers(0, 2**40),
        "backend": BACKENDS,
    },
}


@dataclass(frozen=True)
class Case:
    """A mechanism with options, and a call of it."""

    name: str
    options: dict[str, Any]
    pattern: Pattern
    heads: int
    groups: int
    dims: tuple[int, int]
    batch: int
    lengths: tuple[int, int]
    hidden: tuple[str, str, str]
    bias: str
    spread: float
    dtype: torch.dtype
    training: bool
    dropout: float
    seed: int

    def build(self) -> Mechanism:
        torch.manual_seed(self.seed)
        built = find(self.name)(self.heads, self.dims[0], self.pattern, **nest_options(self.options))
        built.dropout = self.dropout if built.drops_weights else 0.0
        return built.train(self.training)

    def inputs(self, mechanism: Mechanism) -> Inputs:
        return draw(
            mechanism,
            batch=self.batch,
            lengths=self.lengths,
            groups=self.groups,
            value_dim=self.dims[1],
            spread=self.spread,
            dtype=self.dtype,
            seed=self.seed,
        )

    def call(self) -> Call:
        rng = torch.Generator().manual_seed(self.seed + 1)
        (n, m), b, h = self.lengths, self.batch, self.heads
        queries, keys = (_mask(kind, (b, size), rng) for kind, size in zip(self.hidden, (n, m), strict=False))
        if self.hidden[1] == "as queries":
            keys = queries if n == m else None
        shape = {"whole": (b, h, n, m), "shared": (1, 1, n, m), "one row": (b, 1, 1, m)}
        pairs = _mask(self.hidden[2], shape.get(self.hidden[2], (b, h, n, m)), rng)
        bias = None
        if self.bias != "none":
            size = (1, h, n, m) if self.bias == "of heads" else (b, h, n, m)
            bias = (torch.randn(size, generator=rng) * (1e4 if self.bias == "large" else 1)).to(self.dtype)
        return Call(queries=queries, keys=keys, pairs=None if pairs is None else pairs.expand(-1, -1, n, m), bias=bias)

    def refusal(self) -> str | None:
        """Return what the message of a refusal is to say, or None if the case is fine."""
        o, (n, m) = self.options, self.lengths
        supports = frozenset(Pattern) if o.get("allow_noncausal_budget") else find(self.name).supports
        if self.pattern not in supports:
            return "does not support"
        if o.get("hash.kind") == "hadamard" and not 1 <= o["hash.bits"] <= find_hadamard_width(self.dims[0]):
            return "bits"
        empty = 0 in (self.batch, n, m)
        if o.get("conv") and (self.pattern.cross or (self.hidden[2] != "none" and not empty)):
            return "conv|as many keys as queries"
        if o.get("block.share") == "union" and o["block.every"] > 1:
            return "block.every is for votes"
        if self.name == "blocks" and (found := self._refuse_ranking()):
            return found
        if self.pattern.causal and (o.get("block.share") == "vote" or o.get("block.every", 1) > 1):
            return "block.share=union"
        if self.name == "blocks" and (found := self._refuse_together()):
            return found
        if o.get("path") == "gather" and (o["sampling.draws"], o["sampling.distribution"]) != ("shared", "multinomial"):
            return "path=gather"
        if o.get("gate.mode") == "soft" and o["gate.surrogate"] != "sigmoid":
            return f"gate.surrogate={o['gate.surrogate']} is for gate.mode=ste"
        if (
            n > m and not self.pattern.cross and (n > 1 or (self.name == "none" and not empty))
        ):  # a single query is the last token
            return "as many keys as queries|value for every query"
        return None

    def _refuse_ranking(self) -> str | None:
        o = self.options
        if o["block.rank"] == "votes":
            return None
        if o["block.keys"] == 1:
            return "ranks tiles of several keys"
        if o["block.every"] > 1 or o["block.heads"] == "shared":
            return "are for block.rank=votes"
        return "each query chooses" if (o["block.rank"], o["block.share"]) == ("pooled", "vote") else None

    def _refuse_together(self) -> str | None:
        o = self.options
        if o["block.rank"] != "votes" and (o["estimate.bits"], o["estimate.scoring"]) != ("exact", "exact"):
            return "no estimates of scores"
        if o["block.rank"] == "learned" and o["gate.into_scores"]:
            return "auxiliary loss alone"
        if o["block.top"] and o["gate.mode"] != "hard":
            return "set gate.mode=hard"
        return "choose one" if o["block.top"] and o["threshold"] == float("inf") else None


@st.composite
def cases(draw: st.DrawFn, name: str) -> Case:
    """Draw a case; lengths of self attention agree, but for causal decoding, where queries are the last tokens."""
    pattern = draw(st.sampled_from(list(Pattern)))
    n, m = (draw(st.integers(0, 10)) for _ in range(2))
    if not pattern.cross and not (pattern.causal and draw(FLAGS)):
        n = m
    groups = draw(st.integers(1, 3))
    hidden = ["none", "all", "ends", "some"]
    return Case(
        name=name,
        options=draw(st.fixed_dictionaries(OPTIONS[name])),
        pattern=pattern,
        heads=groups * draw(st.integers(1, 2)),
        groups=groups,
        dims=(draw(st.integers(1, 9)), draw(st.integers(1, 9))),
        batch=draw(st.integers(0, 3)),
        lengths=(n, m),
        hidden=(
            draw(st.sampled_from(hidden)),
            draw(st.sampled_from([*hidden, "as queries"])),
            draw(st.sampled_from(["none", "none", "all", "whole", "shared", "one row"])),
        ),
        bias=draw(st.sampled_from(["none", "none", "of heads", "whole", "large"])),
        spread=draw(st.sampled_from([0.0, 1e-3, 1.0, 3.0, 100.0])),
        dtype=draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])),
        training=draw(FLAGS),
        dropout=draw(st.sampled_from([0.0, 0.5])),
        seed=draw(st.integers(0, 2**31)),
    )


def _mask(kind: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor | None:
    if kind in ("none", "as queries"):
        return None
    if kind == "all":
        return torch.zeros(shape, dtype=torch.bool)
    if kind == "ends":
        length = torch.randint(0, shape[-1] + 1, (*shape[:-1], 1), generator=rng)
        return torch.arange(shape[-1]).expand(shape) < length
    return torch.rand(shape, generator=rng) < 0.6
