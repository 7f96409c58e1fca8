"""Every check of the contract sees what it is there to see: each is given mechanisms that break it on purpose."""

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests.attention import broken, broken_nan, broken_state
from thresher.attention import Mechanism, Pattern
from thresher.testing import checks, leaks


class Case(NamedTuple):
    """A check, a mechanism that it must refuse, and what it must say."""

    check: Callable[[Mechanism], None]
    broken: type[Mechanism]
    complaint: str
    pattern: Pattern = Pattern.NONCAUSAL_SELF

    def __str__(self) -> str:
        return f"{self.check.__name__.removeprefix('check_')}-{self.broken.__name__}-{self.pattern.name.lower()}"


CASES = [
    Case(checks.check_shapes_and_costs, broken.nan_in_empty_rows, "output is not finite"),
    Case(checks.check_shapes_and_costs, broken.forgets_value_dimension, "output has shape"),
    Case(checks.check_shapes_and_costs, broken.counts_padded_rows, "cost.visible does not count visible pairs"),
    Case(checks.check_shapes_and_costs, broken.keeps_more_than_visible, "more pairs are kept than are visible"),
    Case(checks.check_shapes_and_costs, broken.negative_cost, "cost.select is negative"),
    Case(checks.check_shapes_and_costs, broken.cost_without_heads, "cost.score has shape"),
    Case(checks.check_shapes_and_costs, broken.adds_an_undeclared_loss, "losses.own is not declared"),
    Case(checks.check_sizes, broken.squeezes_one_token, "output has shape"),
    Case(checks.check_sizes, broken.nan_with_more_queries_than_keys, "output is not finite", Pattern.NONCAUSAL_CROSS),
    Case(leaks.check_hidden_tokens_change_nothing, broken.padding_in_batch_maximum, "nan change the output"),
    Case(leaks.check_hidden_tokens_change_nothing, broken.padding_through_sorting, "change the output"),
    Case(leaks.check_hidden_tokens_change_nothing, broken.padding_of_queries_in_codes, "change the output"),
    Case(leaks.check_hidden_tokens_change_nothing, broken.padding_in_cost, "change cost.select"),
    Case(leaks.check_masks_hide_together, broken.hides_by_one_mask_at_a_time, "change the output"),
    Case(leaks.check_hidden_tokens_get_nothing, broken.nan_in_empty_rows, "is not zero"),
    Case(leaks.check_hidden_tokens_get_nothing, broken.averages_in_empty_rows, "is not zero"),
    Case(leaks.check_hidden_tokens_get_nothing, broken.shows_hidden_queries, "is not zero"),
    Case(leaks.check_hidden_tokens_get_nothing, broken.shows_only_gradients_to_hidden_queries, "has a gradient in q"),
    Case(leaks.check_hidden_tokens_get_nothing, broken.softmax_of_nothing, "has a gradient in q"),
    Case(leaks.check_examples_are_independent, broken.centres_over_the_batch, "depends on another one"),
    Case(leaks.check_examples_are_independent, broken.padding_in_batch_maximum, "depends on another one"),
    Case(leaks.check_examples_are_independent, broken.shares_cost_over_the_batch, "depends on another one"),
    Case(leaks.check_queries_are_independent, broken.centres_queries, "depends on the queries of other rows"),
    Case(leaks.check_queries_are_independent, broken.RanksNothing, "and are not"),
    Case(leaks.check_pooling_is_declared, broken.scales_by_largest_query, "that a mask of pairs hides"),
    Case(leaks.check_pooling_is_declared, broken.PoolsNothing, "and are not"),
    Case(leaks.check_sliding_is_declared, broken.centres_keys, "its window hides", Pattern.CAUSAL_SELF),
    Case(leaks.check_sliding_is_declared, broken.SlidesAfterAll, "but slides", Pattern.CAUSAL_SELF),
    Case(
        leaks.check_whole_masks_are_followed,
        broken.always_hides_the_future,
        "mask does not decide",
        Pattern.CAUSAL_SELF,
    ),
    Case(leaks.check_whole_masks_are_followed, broken.scales_by_largest_query, "the mask hides", Pattern.CAUSAL_SELF),
    Case(checks.check_gradients_arrive, broken_state.DeadThreshold, "threshold has no gradient in some head"),
    Case(checks.check_gradients_arrive, broken_state.UnusedThreshold, "threshold gets no gradient"),
    Case(checks.check_gradients_arrive, broken_state.ThresholdDeadInOneHead, "threshold has no gradient in some head"),
    Case(checks.check_gradients_arrive, broken_state.InfiniteGradient, "threshold gets a gradient that is not finite"),
    Case(checks.check_gradients_arrive, broken.forgets_keys_in_backward, "k gets no gradient"),
    Case(checks.check_gradients_arrive, broken.LooksAtQueries, "q is declared to have no influence"),
    Case(leaks.check_content_is_ignored, broken.LooksAtQueries, "have an influence"),
    Case(checks.check_parameters_can_be_sharded, broken_state.ScalarThreshold, "threshold has no dimension"),
    Case(checks.check_parameters_can_be_sharded, broken_state.ThresholdInBf16, "threshold is torch.bfloat16"),
    Case(checks.check_dense_limit, broken.wrong_scale, "out is off"),
    Case(checks.check_dense_limit, broken.wrong_normaliser, "out is off"),
    Case(checks.check_dense_limit, broken.wrong_gradient_only, "v is off"),
    Case(checks.check_dense_limit, broken.forgets_the_scores, "total cost is not"),
    Case(checks.check_dense_limit, broken.drops_a_pair, "not every visible pair is kept"),
    Case(checks.check_dense_limit, broken.ignores_bias, "out is off"),
    Case(checks.check_dense_limit, broken.forgets_bias_in_backward, "bias is off"),
    Case(checks.check_dense_limit, broken.shares_heads_in_the_wrong_order, "out is off"),
    Case(leaks.check_randomness_is_declared, broken.undeclared_randomness, "stochastic is False, but seeds do matter"),
    Case(
        leaks.check_randomness_is_declared, broken.UndeclaredDeterminism, "stochastic is True, but seeds do not matter"
    ),
    Case(leaks.check_randomness_is_declared, broken.RandomInEvaluation, "evaluation is not reproducible"),
    Case(leaks.check_randomness_is_declared, broken.draws_in_evaluation, "draws from the global generator"),
    Case(
        checks.check_expectation_is_forward, broken.PromisesAnotherExpectation, "expectation() differs from forward()"
    ),
    Case(leaks.check_calls_leave_nothing_behind, broken_state.CountsCalls, "changes the state"),
    Case(leaks.check_calls_leave_nothing_behind, broken_state.RemembersTheLastCall, "depends on the one before"),
    Case(leaks.check_calls_leave_nothing_behind, broken.overwrites_queries, "overwrites q"),
    Case(checks.check_layout_does_not_matter, broken.reads_memory_in_order, "not close"),
    Case(checks.check_low_precision, broken.rounds_coarsely, "where plain attention has"),
    Case(checks.check_low_precision, broken.answers_in_fp32, "come out as torch.float32"),
    Case(checks.check_low_precision, broken.counts_in_bf16, "cost.visible does not count visible pairs"),
    Case(checks.check_low_precision, broken.infinite_gradients_in_bf16, "gradient of q is not finite"),
    Case(checks.check_any_float_type, broken.answers_in_fp32, "come out as torch.float32"),
    Case(checks.check_any_float_type, broken.counts_in_bf16, "cost.visible does not count visible pairs"),
    Case(checks.check_any_float_type, broken.overflows_in_fp16, "not finite in torch.float16"),
    Case(checks.check_nan_in_is_nan_out, broken_nan.hides_nan, "does not show in a row that reads it"),
    Case(checks.check_nan_in_is_nan_out, broken_nan.nan_for_all, "reaches a row that does not see it"),
    Case(checks.check_nan_in_is_nan_out, broken_nan.shrinks_with_nan, "moves a row that does not see it"),
    Case(checks.check_nan_in_is_nan_out, broken_nan.counts_nan, "makes cost.select invalid"),
    Case(checks.check_dropout_is_for_training, broken.drops_in_evaluation, "acts in evaluation"),
    Case(checks.check_dropout_is_for_training, broken.NeverDrops, "does nothing in training"),
    Case(checks.check_dropout_is_for_training, broken.drops_without_rescaling, "changes the mean output"),
    Case(checks.check_dropout_is_for_training, broken.counts_only_what_is_not_dropped, "changes the cost"),
    Case(checks.check_state_survives_saving, broken_state.ForgetsABuffer, "missing from the state dict"),
    Case(checks.check_dense_checkpoint_loads, broken_state.RefusesDenseCheckpoints, "does not load"),
    Case(checks.check_dense_checkpoint_loads, broken_state.AcceptsPartOfItself, "loads without an error"),
    Case(checks.check_dense_checkpoint_loads, broken_state.ResetsOnDenseCheckpoints, "changes the state"),
    Case(leaks.check_rows_ignore_what_follows, broken.ranks_queries, "sees the future", Pattern.CAUSAL_SELF),
    Case(leaks.check_rows_ignore_what_follows, broken.ranks_queries, "sees the future", Pattern.CAUSAL_CROSS),
    Case(leaks.check_rows_ignore_what_follows, broken.scales_by_largest_query, "sees the future", Pattern.CAUSAL_SELF),
    Case(leaks.check_rows_ignore_what_follows, broken.scales_by_largest_query, "sees the future", Pattern.CAUSAL_CROSS),
    Case(leaks.check_rows_ignore_what_follows, broken.sees_one_token_ahead, "sees the future", Pattern.CAUSAL_SELF),
    Case(
        checks.check_decoding_continues_the_sequence,
        broken.causal_from_the_upper_left,
        "not close",
        Pattern.CAUSAL_SELF,
    ),
    Case(checks.check_decoding_continues_the_sequence, broken.forgets_slots, "not close", Pattern.CAUSAL_SELF),
]
SLOW_CASES = [
    Case(checks.check_compiled_equals_eager, broken.branches_on_values, "does not compile into one graph"),
    Case(checks.check_compiled_equals_eager, broken.differs_when_compiled, "not close"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_check_sees_a_broken_mechanism(case: Case) -> None:
    with pytest.raises(AssertionError, match=re.escape(case.complaint)):
        case.check(case.broken(4, 8, case.pattern))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("case", SLOW_CASES, ids=str)
def test_the_check_of_compilation_sees_a_broken_mechanism(case: Case) -> None:
    with pytest.raises(AssertionError, match=case.complaint):
        checks.check_compiled_equals_eager(case.broken(4, 8, case.pattern), backend="aot_eager")


def test_an_honest_stochastic_mechanism_passes() -> None:
    few, many = (broken.Noisy(2, 8, Pattern.CAUSAL_SELF, samples=samples) for samples in (1, 64))
    checks.check_samples_bring_it_near_expectation(few, many)
    leaks.check_randomness_is_declared(few)


@pytest.mark.parametrize("estimator", [broken.AsNoisyAsEver, broken.Biased])
def test_an_estimator_that_does_not_converge_is_seen(estimator: type[broken.Noisy]) -> None:
    few, many = (estimator(2, 8, Pattern.CAUSAL_SELF, samples=samples) for samples in (1, 64))
    with pytest.raises(AssertionError, match="do not help"):
        checks.check_samples_bring_it_near_expectation(few, many)


@pytest.mark.parametrize(
    "check",
    [
        checks.check_shapes_and_costs,
        checks.check_sizes,
        leaks.check_hidden_tokens_change_nothing,
        leaks.check_hidden_tokens_get_nothing,
        leaks.check_rows_ignore_what_follows,
        leaks.check_examples_are_independent,
        checks.check_gradients_arrive,
        checks.check_dense_limit,
        leaks.check_randomness_is_declared,
        leaks.check_calls_leave_nothing_behind,
        checks.check_layout_does_not_matter,
        checks.check_decoding_continues_the_sequence,
        checks.check_low_precision,
        checks.check_dropout_is_for_training,
    ],
)
def test_an_honest_mechanism_that_reads_the_source_of_values_passes(check: Callable[[Mechanism], None]) -> None:
    check(broken.FromSource(4, 8, Pattern.CAUSAL_SELF))


@pytest.mark.parametrize("check", [leaks.check_hidden_tokens_change_nothing, leaks.check_rows_ignore_what_follows])
def test_a_leak_through_the_source_of_values_is_seen(check: Callable[[Mechanism], None]) -> None:
    with pytest.raises(AssertionError, match=r"change the output|sees the future"):
        check(broken.leaks_through_the_source(4, 8, Pattern.CAUSAL_SELF))


def test_every_check_is_fed_a_broken_mechanism() -> None:
    fed = {case.check.__name__ for case in [*CASES, *SLOW_CASES]}
    fed.add(checks.check_samples_bring_it_near_expectation.__name__)
    assert fed == {name for name in {**vars(checks), **vars(leaks)} if name.startswith("check_")}
