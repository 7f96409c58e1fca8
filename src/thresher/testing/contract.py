"""The contract of a mechanism as a list of checks; run those that apply to a mechanism."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from thresher.attention import Mechanism, Pattern
from thresher.testing import checks, leaks

Make = Callable[..., Mechanism]
Applies = Callable[[Mechanism], bool]
SIZE: Mapping[str, Any] = {"num_heads": 2, "head_dim": 8}


@dataclass(frozen=True)
class Check:
    """One promise of the contract.

    Attributes:
        run: Function that takes a built mechanism and raises AssertionError if the promise is broken.
        applies: Function that tells whether a mechanism makes the promise.
        changes: Function from the class to further hyper-parameters for this check.
    """

    run: Callable[[Mechanism], None]
    applies: Applies = lambda mechanism: True
    changes: Callable[[type[Mechanism]], Mapping[str, Any]] = lambda cls: {}

    @property
    def name(self) -> str:
        return self.run.__name__.removeprefix("check_").replace("_", " ")


@dataclass(frozen=True)
class Fault:
    """A promise that a mechanism breaks.

    Attributes:
        pattern: Pattern of the attention.
        check: Name of the check.
        complaint: Message of the check.
    """

    pattern: Pattern
    check: str
    complaint: str

    def __str__(self) -> str:
        return f"{self.pattern.name.lower()}: {self.check}: {self.complaint}"


def check_expectation(mechanism: Mechanism) -> None:
    """Check that a precise stochastic mechanism converges to its expectation; any other equals it."""
    if mechanism.stochastic:
        assert mechanism.precise, "a stochastic mechanism must declare `precise` hyper-parameters"
        default = type(mechanism)(mechanism.num_heads, mechanism.head_dim, mechanism.pattern)
        checks.check_samples_bring_it_near_expectation(default, mechanism)
    else:
        assert mechanism.precise is None, "only a stochastic mechanism may declare `precise` hyper-parameters"
        checks.check_expectation_is_forward(mechanism)


def check_dropout(mechanism: Mechanism) -> None:
    """Check that dropout acts on weights, or raises an error if there are none."""
    if mechanism.drops_weights:
        checks.check_dropout_is_for_training(mechanism)
        return
    try:
        mechanism.dropout = 0.1
    except ValueError:
        return
    raise AssertionError("it has no weights to drop, but accepts a dropout")


def _get_selective(cls: type[Mechanism]) -> Mapping[str, Any]:
    return cls.selective


def _get_precise(cls: type[Mechanism]) -> Mapping[str, Any]:
    return cls.precise or {}


def _get_dense_limit(cls: type[Mechanism]) -> Mapping[str, Any]:
    return {"num_heads": 4, **(cls.dense_limit or {})}


def _applies_in(pattern: Pattern) -> Applies:
    return lambda mechanism: mechanism.pattern is pattern


def _has_dense_limit(mechanism: Mechanism) -> bool:
    return mechanism.dense_limit is not None


LEAKS = (
    Check(leaks.check_hidden_tokens_change_nothing),
    Check(leaks.check_masks_hide_together),
    Check(leaks.check_hidden_tokens_get_nothing),
    Check(leaks.check_examples_are_independent),
    Check(leaks.check_queries_are_independent, changes=_get_selective),
    Check(leaks.check_rows_ignore_what_follows, lambda mechanism: mechanism.pattern.causal),
    Check(leaks.check_pooling_is_declared, _applies_in(Pattern.NONCAUSAL_SELF), _get_selective),
    Check(leaks.check_sliding_is_declared, _applies_in(Pattern.CAUSAL_SELF), _get_selective),
    Check(leaks.check_whole_masks_are_followed, _applies_in(Pattern.CAUSAL_SELF)),
    Check(leaks.check_content_is_ignored, lambda mechanism: not mechanism.content_based),
    Check(leaks.check_calls_leave_nothing_behind),
    Check(leaks.check_randomness_is_declared),
)
CONTRACT = (
    Check(checks.check_shapes_and_costs),
    Check(checks.check_sizes),
    *LEAKS,
    Check(checks.check_gradients_arrive, changes=_get_selective),
    Check(checks.check_parameters_can_be_sharded),
    Check(checks.check_layout_does_not_matter),
    Check(checks.check_any_float_type),
    Check(checks.check_nan_in_is_nan_out),
    Check(checks.check_state_survives_saving),
    Check(checks.check_dense_checkpoint_loads),
    Check(checks.check_decoding_continues_the_sequence, _applies_in(Pattern.CAUSAL_SELF)),
    Check(checks.check_dense_limit, _has_dense_limit, _get_dense_limit),
    Check(checks.check_low_precision, _has_dense_limit, _get_dense_limit),
    Check(check_expectation, changes=_get_precise),
    Check(check_dropout),
)


def find_faults(
    mechanism: type[Mechanism], *, contract: tuple[Check, ...] = CONTRACT, **hyperparameters: Any
) -> Iterator[Fault]:
    """Find the faults of a mechanism, pattern by pattern.

    Args:
        mechanism: Class of the mechanism.
        contract: Checks to run.
        **hyperparameters: Hyper-parameters of the mechanism.
    """
    for pattern in Pattern:
        if not can_build(mechanism, pattern, **hyperparameters):
            continue
        for check in contract:
            complaint = find_complaint(check, mechanism, pattern, **hyperparameters)
            if complaint is not None:
                yield Fault(pattern, check.name, complaint)


def can_build(mechanism: type[Mechanism], pattern: Pattern, **hyperparameters: Any) -> bool:
    """Check whether a mechanism can be built in a pattern; unsupported patterns must raise ValueError."""
    try:
        mechanism(**{**SIZE, "pattern": pattern, **hyperparameters})
    except ValueError:
        return False
    return True


def find_complaint(check: Check, mechanism: type[Mechanism], pattern: Pattern, **hyperparameters: Any) -> str | None:
    """Run a check; return its complaint in one line, or None."""
    torch.manual_seed(0)
    try:
        built = mechanism(**{**SIZE, **hyperparameters, **check.changes(mechanism), "pattern": pattern})
        if check.applies(built):
            check.run(built)
    except AssertionError as error:
        return (str(error).strip().splitlines() or ["the check failed without a message"])[0]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def check(mechanism: type[Mechanism], **hyperparameters: Any) -> None:
    """Check that a mechanism keeps the contract in every pattern that it supports.

    Args:
        mechanism: Class of the mechanism.
        **hyperparameters: Hyper-parameters other than the defaults.

    Raises:
        AssertionError: The mechanism breaks the contract; the message lists each broken promise.
    """
    faults = list(find_faults(mechanism, **hyperparameters))
    if faults:
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise AssertionError(f"{mechanism.__name__} breaks the contract:\n{lines}")
