"""What holds for every call of every mechanism, whatever its shapes, masks and options: cases drawn by Hypothesis.

A few for each mechanism in every run of the tests; `HYPOTHESIS_PROFILE=long pytest tests/attention/test_properties.py`
draws 1,500 for each.
"""

import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.attention.cases import OPTIONS, Case, cases
from thresher.attention import available, find, hyperparameters
from thresher.attention.options import flatten_options
from thresher.testing.checks import assert_sound
from thresher.testing.inputs import attend, disturb, gradients, same, visible_by_definition

NAN = float("nan")
SHARED = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "print_blob": False}
settings.register_profile("short", max_examples=50, derandomize=True, **SHARED)
settings.register_profile("long", max_examples=1500, phases=[Phase.explicit, Phase.generate, Phase.shrink], **SHARED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


def run(case: Case) -> None:
    mechanism = case.build()
    attend(mechanism, case.inputs(mechanism), case.call())


def check_case(case: Case) -> None:
    """A case is refused by a sentence that names the option, or does all that the contract says."""
    wanted = case.refusal()
    if wanted is not None:
        with pytest.raises(ValueError, match=wanted):
            run(case)
        return
    mechanism = case.build()
    inputs, call = case.inputs(mechanism), case.call()
    visible = visible_by_definition(mechanism, inputs, call)
    attended, found = gradients(mechanism, inputs, call)
    assert_sound(mechanism, inputs, call, attended)
    assert (attended.out[~visible.any(-1)] == 0).all(), "a row without a key is not zero"
    for name, gradient in found.items():
        assert gradient is None or gradient.isfinite().all(), f"the gradient of {name} is not finite"
    groups = visible.any(-2).unflatten(1, (case.groups, -1)).any(2)
    for size in (100.0, NAN):
        other = disturb(inputs, ~visible.any(-1), ~groups, size)
        assert same(attend(mechanism, inputs, call), attend(mechanism, other, call)), "hidden tokens change something"


def test_every_option_of_every_mechanism_is_drawn() -> None:
    assert {name: set(options) for name, options in OPTIONS.items()} == {
        name: set(flatten_options(hyperparameters(find(name)))) for name in available()
    }


def property_of(name: str) -> Callable[[], None]:
    return given(cases(name))(check_case)


@pytest.mark.parametrize("name", OPTIONS)
def test_any_call_is_sound_or_refused(name: str) -> None:
    property_of(name)()
