"""What the contract promises, of LATTE at other settings than the defaults."""

import math
from collections.abc import Callable

import pytest
import torch

from tests.attention.latte_reference import (
    CAUSAL,
    SELF,
    kept_by,
    latte,
)
from tests.shapes import OF_SHAPES, without_shape_checks
from thresher.attention import Mechanism, Pattern
from thresher.attention.latte.mechanism import Latte
from thresher.testing import checks, leaks
from thresher.testing.inputs import Inputs, attend, draw

SOFT = {"mode": "soft", "surrogate": "sigmoid"}
VARIANTS = [
    {"threshold": 1.0, "estimate": {"bits": 2}},
    {"threshold": 1.0, "estimate": {"bits": 4, "split": "truncate"}},
    {"threshold": 1.0, "estimate": {"bits": 8, "scoring": "int8"}},
    {"threshold": 1.0, "estimate": {"bits": "exact", "scoring": "int8"}},
    {"threshold": 2.0, "gate": {**SOFT}},
    {"threshold": 2.0, "gate": {**SOFT, "into_scores": False}},
    {"threshold": 1.0, "gate": {"mode": "hard"}},
    {"threshold": 1.0, "always_keep": 2},
    {"threshold": 0.6, "unit": "spread"},
    {
        "threshold": 0.6,
        "unit": "spread",
        "gate": {**SOFT},
        "estimate": {"bits": "exact"},
    },
    {"threshold": 0.6, "unit": "spread", "gate": {"surrogate": "compact", "tau": 0.1}},
    {"threshold": 0.6, "unit": "spread", "gate": {"surrogate": "inside", "tau": 0.1}},
    {"threshold": 0.6, "unit": "spread", "gate": {"surrogate": "compact", "tau": 0.1}, "backend": "reference"},
    {"threshold": 0.0},
    {"threshold": math.inf, "estimate": {"scoring": "int8"}},
]


CHECKS = [
    checks.check_shapes_and_costs,
    leaks.check_hidden_tokens_change_nothing,
    leaks.check_hidden_tokens_get_nothing,
    leaks.check_examples_are_independent,
]


@pytest.mark.parametrize(("number", "variant"), list(enumerate(VARIANTS)), ids=str)
@pytest.mark.parametrize(("turn", "check"), list(enumerate(CHECKS)))
def test_the_contract_holds_at(
    turn: int, check: Callable[[Mechanism], None], number: int, variant: dict[str, object]
) -> None:
    """Patterns take turns: any two of variant, check and pattern meet."""
    pattern = (CAUSAL, Pattern.NONCAUSAL_CROSS)[(number + turn) % 2]
    with without_shape_checks(check not in OF_SHAPES):
        check(Latte(2, 8, pattern, **variant))  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", [CAUSAL, Pattern.CAUSAL_CROSS])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_causal_rows_ignore_what_follows_at(variant: dict[str, object], pattern: Pattern) -> None:
    leaks.check_rows_ignore_what_follows(Latte(2, 8, pattern, **variant))  # type: ignore[arg-type]


def test_codes_of_causal_attention_have_a_scale_for_each_token() -> None:
    """A later outlier would make one shared scale so coarse that earlier rows keep other keys."""
    mechanism = latte(CAUSAL, threshold=1.0, estimate={"bits": 4}).eval()
    inputs = draw(mechanism, spread=1.5)
    outlier = Inputs(inputs.q.clone(), inputs.k.clone(), inputs.v.clone())
    outlier.q[:, :, -1], outlier.k[:, :, -1] = 1e4, 1e4
    assert torch.equal(attend(mechanism, outlier).out[:, :, :-1], attend(mechanism, inputs).out[:, :, :-1])
    noncausal = latte(SELF, threshold=1.0, estimate={"bits": 4}).eval()
    assert not torch.equal(kept_by(noncausal, outlier)[:, :, :-1], kept_by(noncausal, inputs)[:, :, :-1])
