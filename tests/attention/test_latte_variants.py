"""What the contract promises, of LATTE at other settings than the defaults."""

import math
from collections.abc import Callable

import pytest
import torch

from tests.attention import checks, leaks
from tests.attention.helpers import Inputs, attend, draw
from tests.attention.latte_reference import (
    CAUSAL,
    SELF,
    kept_by,
    latte,
)
from thresher.attention import Mechanism, Pattern
from thresher.attention.latte import Latte

VARIANTS = [
    {"theta": 1.0, "est_bits": 2},
    {"theta": 1.0, "est_bits": 4, "split": "truncate"},
    {"theta": 1.0, "est_bits": 8, "scoring": "int8"},
    {"theta": 1.0, "est_bits": "exact", "scoring": "int8"},
    {"theta": 2.0, "mode": "soft"},
    {"theta": 2.0, "mode": "soft", "gate_grad_to_scores": False},
    {"theta": 1.0, "mode": "hard"},
    {"theta": 1.0, "always_keep": 2},
    {"theta": 0.6, "unit": "spread"},
    {"theta": 0.6, "unit": "spread", "mode": "soft", "est_bits": "exact"},
    {"theta": 0.6, "unit": "spread", "surrogate": "compact", "tau": 0.1},
    {"theta": 0.6, "unit": "spread", "surrogate": "inside", "tau": 0.1},
    {"theta": 0.6, "unit": "spread", "surrogate": "compact", "tau": 0.1, "backend": "reference"},
    {"theta": 0.0},
    {"theta": math.inf, "scoring": "int8"},
]


@pytest.mark.parametrize("pattern", [CAUSAL, Pattern.NONCAUSAL_CROSS])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(
    "check",
    [
        checks.check_shapes_and_costs,
        leaks.check_hidden_tokens_change_nothing,
        leaks.check_hidden_tokens_get_nothing,
        leaks.check_examples_are_independent,
    ],
)
def test_the_contract_holds_at(
    check: Callable[[Mechanism], None], variant: dict[str, object], pattern: Pattern
) -> None:
    check(Latte(2, 8, pattern, **variant))  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", [CAUSAL, Pattern.CAUSAL_CROSS])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_causal_rows_ignore_what_follows_at(variant: dict[str, object], pattern: Pattern) -> None:
    leaks.check_rows_ignore_what_follows(Latte(2, 8, pattern, **variant))  # type: ignore[arg-type]


def test_codes_of_causal_attention_have_a_scale_for_each_token() -> None:
    """A later outlier would make one shared scale so coarse that earlier rows keep other keys."""
    mechanism = latte(CAUSAL, theta=1.0, est_bits=4).eval()
    inputs = draw(mechanism, spread=1.5)
    outlier = Inputs(inputs.q.clone(), inputs.k.clone(), inputs.v.clone())
    outlier.q[:, :, -1], outlier.k[:, :, -1] = 1e4, 1e4
    assert torch.equal(attend(mechanism, outlier).out[:, :, :-1], attend(mechanism, inputs).out[:, :, :-1])
    noncausal = latte(SELF, theta=1.0, est_bits=4).eval()
    assert not torch.equal(kept_by(noncausal, outlier)[:, :, :-1], kept_by(noncausal, inputs)[:, :, :-1])
