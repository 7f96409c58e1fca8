"""What the interpreter computes: small calls of every pattern, with ragged ends, padding, grouped heads and tails."""

from typing import Any, NamedTuple

import torch

from thresher.attention import Call, Pattern
from thresher.testing.inputs import first, padded

SELF, CAUSAL = Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF
CROSS, CAUSAL_CROSS = Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS
TILE = 16


class Case(NamedTuple):
    """A call and how to build its mechanism.

    Attributes:
        mechanism: "blocks" or "latte".
        pattern: Its pattern.
        lengths: Numbers of queries and keys.
        options: Hyper-parameters.
        mask: Which tokens are hidden, one of `build_call`.
        dtype: Type of the inputs.
        head_dim: Length of queries and keys.
        value_dim: Length of values.
        groups: Number of heads of keys, for two heads of queries.
        spread: Of the scores.
        seed: One with which rounding in fp32 changes no decision.
        broken: Name of a fault that the kernels have.
        nan: Whether a value is NaN.
    """

    mechanism: str
    pattern: Pattern
    lengths: tuple[int, int]
    options: dict[str, Any]
    mask: str = "none"
    dtype: torch.dtype = torch.float32
    head_dim: int = 16
    value_dim: int = 16
    groups: int = 2
    spread: float = 1.3
    seed: int = 0
    broken: str = ""
    nan: bool = False


def build_call(case: Case) -> Call:
    """Build the masks of a call of two examples."""
    n, m = case.lengths
    calls = {
        "none": Call(),
        "right": padded(case.pattern, lengths=case.lengths),
        "left": padded(case.pattern, lengths=case.lengths, left=True),
        "no keys": Call(keys=first([0, m - 3], m)),
        "no queries": Call(queries=torch.arange(n).expand(2, n) >= 20),
    }
    return calls[case.mask]


VOTE: dict[str, Any] = {"threshold": 0.45, "block": {"queries": 12, "share": "vote"}}
UNION: dict[str, Any] = {"threshold": 0.35, "block": {"queries": 20, "share": "union"}}
NATS: dict[str, Any] = {"unit": "nats", "threshold": 1.3}
TAIL: dict[str, Any] = {"tail": "mean"}
LATTE: dict[str, Any] = {"threshold": 0.3}

CASES: dict[str, Case] = {
    "votes": Case("blocks", SELF, (39, 39), VOTE | TAIL | {"always_keep": 2}, groups=1),
    "votes, some rows": Case(
        "blocks",
        CROSS,
        (27, 41),
        VOTE | NATS | {"block": {"queries": 12, "every": 3}},
        "right",
        head_dim=20,
        value_dim=11,
    ),
    "votes, blocks without queries": Case(
        "blocks", SELF, (37, 37), VOTE | {"gate": {"mode": "hard"}, "estimate": {"bits": 8}}, "no queries"
    ),
    "votes in fp16": Case("blocks", SELF, (37, 37), VOTE | TAIL, "left", torch.float16),
    "votes in bf16": Case("blocks", SELF, (37, 37), VOTE | TAIL, dtype=torch.bfloat16),
    "votes, a value is NaN": Case("blocks", SELF, (23, 23), VOTE, nan=True),
    "unions": Case("blocks", SELF, (41, 41), UNION | TAIL | {"gate": {"into_scores": True}}, "left", value_dim=5),
    "causal unions": Case("blocks", CAUSAL, (41, 41), UNION | TAIL, "right", groups=1),
    "causal unions, last queries": Case("blocks", CAUSAL, (23, 41), UNION | NATS | {"always_keep": 1}),
    "unions without keys": Case("blocks", CAUSAL_CROSS, (23, 37), UNION | TAIL, "no keys"),
    "latte": Case("latte", SELF, (37, 37), LATTE | TAIL, "left", groups=1, seed=1),
    "latte, causal": Case("latte", CAUSAL, (41, 41), LATTE | {"always_keep": 1}, "right", head_dim=20, value_dim=11),
    "latte, last queries": Case("latte", CAUSAL, (23, 53), LATTE | TAIL | NATS, spread=2.0),
    "latte, cross": Case("latte", CROSS, (23, 53), LATTE | {"gate": {"into_scores": False}, "estimate": {"bits": 8}}),
    "latte without keys": Case("latte", CAUSAL_CROSS, (23, 37), LATTE | TAIL, "no keys"),
    "latte, a value is NaN": Case("latte", CAUSAL, (23, 23), LATTE, nan=True),
    "latte in fp16": Case("latte", CAUSAL, (37, 37), LATTE | TAIL, "none", torch.float16),
    "latte in bf16": Case("latte", SELF, (37, 37), LATTE | TAIL, "right", torch.bfloat16, seed=1),
}
BROKEN: dict[str, Case] = {
    "future": Case("latte", CAUSAL, (37, 37), LATTE, broken="future"),
    "padding": Case("blocks", SELF, (37, 37), VOTE, "right", broken="padding"),
    "slope": Case("blocks", CAUSAL, (37, 37), UNION, broken="slope"),
}
