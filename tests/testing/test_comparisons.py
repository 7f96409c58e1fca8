"""Comparisons see what they are there to see, and tell how far apart things are."""

import pytest
import torch
from torch import Tensor

from tests.attention import broken, broken_state
from thresher.attention import Mechanism, Pattern
from thresher.attention.dense import Dense
from thresher.testing.comparisons import compare_with_reference, measure_sampling_error
from thresher.testing.inputs import draw


def build(cls: type[Mechanism]) -> Mechanism:
    return cls(2, 8, Pattern.NONCAUSAL_SELF)


def test_what_computes_the_same_is_not_apart() -> None:
    differences = compare_with_reference(build(Dense), build(Dense), draw(build(Dense)), 1e-9, "cpu")
    assert differences == {"output": 0.0, "gradient of q": 0.0, "gradient of k": 0.0, "gradient of v": 0.0}


@pytest.mark.parametrize(
    ("cls", "reference", "said"),
    [
        (broken.wrong_normaliser, Dense, "cpu's output is off the reference's by 1.0e-05, more than 1e-09"),
        (broken.wrong_gradient_only, Dense, "cpu's gradient of v is off the reference's by 1.0e"),
        (broken.drops_a_pair, Dense, "cpu keeps 0.9796 of the pairs, its reference 1.0000"),
        (broken.forgets_keys_in_backward, Dense, "cpu and its reference do not both train k"),
        (broken_state.UnusedThreshold, broken_state.WithThreshold, "do not both train threshold"),
    ],
)
def test_a_wrong_backend_is_found_out(cls: type[Mechanism], reference: type[Mechanism], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        compare_with_reference(build(cls), build(reference), draw(build(Dense)), 1e-9, "cpu")


def test_the_reference_gets_the_state_of_the_backend() -> None:
    fast = build(broken_state.WithThreshold)
    with torch.no_grad():
        fast.threshold.fill_(5)
    compare_with_reference(fast, build(broken_state.WithThreshold), draw(fast), 1e-9, "cpu")


def test_what_draws_at_random_is_compared_in_evaluation() -> None:
    class WrongInEvaluation(broken.Noisy):
        def noise(self, x: Tensor) -> Tensor:
            return super().noise(x) if self.training else super().noise(x) * 2

    compare_with_reference(build(broken.Noisy), build(broken.Noisy), draw(build(Dense)), 1e-9, "cpu")
    with pytest.raises(AssertionError, match="output is off"):
        compare_with_reference(build(WrongInEvaluation), build(broken.Noisy), draw(build(Dense)), 1e-9, "cpu")


def test_the_error_of_sampling_is_that_of_the_noise() -> None:
    assert measure_sampling_error(build(broken.Noisy), draw(build(Dense)), draws=64) == pytest.approx(1, abs=0.05)
