"""Every mechanism of `conf/attention` keeps the promises of the contract, in every pattern that it supports."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch

from tests.attention import checks, leaks
from tests.attention.helpers import CONF, configured
from thresher.attention import Mechanism, Pattern, available, find, hyperparameters


class Cell(NamedTuple):
    """One mechanism in one pattern."""

    name: str
    make: partial[Mechanism]
    pattern: Pattern

    @property
    def cls(self) -> type[Mechanism]:
        return self.make.func  # type: ignore[return-value]

    def build(self, num_heads: int = 2, **changes: object) -> Mechanism:
        torch.manual_seed(0)
        return self.make(num_heads=num_heads, head_dim=8, pattern=self.pattern, **changes)

    def __str__(self) -> str:
        return f"{self.name}-{self.pattern.name.lower()}"


MAKERS = configured()
IN_PYTORCH = {
    f"{name}-reference": partial(make.func, **(make.keywords | {"backend": "reference"}))
    for name, make in MAKERS.items()
    if "backend" in make.keywords
}
CELLS = [Cell(name, make, pattern) for name, make in (MAKERS | IN_PYTORCH).items() for pattern in Pattern]
SUPPORTED = [cell for cell in CELLS if cell.pattern in cell.cls.supports]


def over(cells: list[Cell]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("cell", cells, ids=str)


@over([cell for cell in CELLS if cell not in SUPPORTED])
def test_an_unsupported_pattern_is_refused_when_built(cell: Cell) -> None:
    with pytest.raises(ValueError, match=f"does not support {cell.pattern.name.lower()}"):
        cell.build()


@over(SUPPORTED)
@pytest.mark.parametrize("size", [{"num_heads": 0}, {"head_dim": 0}], ids=str)
def test_a_mechanism_without_heads_or_dimensions_is_refused(cell: Cell, size: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        cell.make(**({"num_heads": 2, "head_dim": 8, "pattern": cell.pattern} | size))


@over(SUPPORTED)
@pytest.mark.parametrize(
    "check",
    [
        checks.check_shapes_and_costs,
        checks.check_sizes,
        leaks.check_hidden_tokens_change_nothing,
        leaks.check_masks_hide_together,
        leaks.check_hidden_tokens_get_nothing,
        leaks.check_examples_are_independent,
        leaks.check_queries_are_independent,
        checks.check_gradients_arrive,
        checks.check_parameters_can_be_sharded,
        leaks.check_randomness_is_declared,
        leaks.check_calls_leave_nothing_behind,
        checks.check_layout_does_not_matter,
        checks.check_any_float_type,
        checks.check_state_survives_saving,
        checks.check_dense_checkpoint_loads,
    ],
)
def test_every_mechanism(check: Callable[[Mechanism], None], cell: Cell) -> None:
    check(cell.build())


@over(SUPPORTED)
def test_dropout_acts_on_weights_or_is_refused(cell: Cell) -> None:
    if cell.cls.drops_weights:
        checks.check_dropout_is_for_training(cell.build())
    else:
        with pytest.raises(ValueError, match="no attention weights"):
            cell.build().dropout = 0.1


@over([cell for cell in SUPPORTED if cell.pattern.causal])
def test_rows_ignore_what_follows(cell: Cell) -> None:
    leaks.check_rows_ignore_what_follows(cell.build())


@over([cell for cell in SUPPORTED if cell.pattern is Pattern.CAUSAL_SELF])
def test_decoding_continues_the_sequence(cell: Cell) -> None:
    checks.check_decoding_continues_the_sequence(cell.build())


@over([cell for cell in SUPPORTED if not cell.cls.content_based])
def test_content_is_ignored_where_declared(cell: Cell) -> None:
    leaks.check_content_is_ignored(cell.build())


@over([cell for cell in SUPPORTED if cell.cls.dense_limit is not None])
@pytest.mark.parametrize("check", [checks.check_dense_limit, checks.check_low_precision])
def test_at_its_dense_limit(check: Callable[[Mechanism], None], cell: Cell) -> None:
    assert cell.cls.dense_limit is not None
    check(cell.build(num_heads=4, **cell.cls.dense_limit))


@over(SUPPORTED)
def test_expectation_is_what_more_samples_bring_it_near(cell: Cell) -> None:
    if cell.cls.stochastic:
        assert cell.cls.precise, "a stochastic mechanism names the hyper-parameters at which it is precise"
        checks.check_samples_bring_it_near_expectation(cell.build(), cell.build(**cell.cls.precise))
    else:
        assert cell.cls.precise is None, "only a stochastic mechanism has something to be precise about"
        checks.check_expectation_is_forward(cell.build())


@pytest.mark.parametrize("name", ["base", "functional", "thresholds", "quantise", "__init__", "../latte"])
def test_a_file_without_a_mechanism_is_no_mechanism(name: str) -> None:
    with pytest.raises(ValueError, match="there is no attention"):
        find(name)


def test_every_mechanism_has_a_file_of_hyper_parameters() -> None:
    assert list(MAKERS) == available()


@pytest.mark.parametrize("name", MAKERS)
def test_the_yaml_repeats_the_constructor(name: str) -> None:
    make = MAKERS[name]
    keywords = {p.name: p.default for p in inspect.signature(make.func).parameters.values() if p.kind is p.KEYWORD_ONLY}
    written = dict(make.keywords)
    assert written == keywords
    assert {key: type(value) for key, value in written.items()} == {key: type(value) for key, value in keywords.items()}
    assert list(written) == list(keywords), "the YAML lists the hyper-parameters in another order"
    assert written == hyperparameters(find(name))


@pytest.mark.parametrize("name", MAKERS)
def test_a_file_names_the_mechanism_that_is_found_under_its_name(name: str) -> None:
    assert f"_target_: thresher.attention.{name}." in (CONF / f"{name}.yaml").read_text()
    assert find(name) is MAKERS[name].func


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from PyTorch itself
@pytest.mark.usefixtures("unchecked_shapes")
@over(SUPPORTED)
def test_a_mechanism_compiles_into_one_graph(cell: Cell) -> None:
    checks.check_compiled_equals_eager(cell.build(), backend="aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from PyTorch itself
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning")  # from PyTorch itself
@pytest.mark.usefixtures("unchecked_shapes")
@over([next(cell for cell in SUPPORTED if cell.name == name) for name in MAKERS])
def test_generated_code_equals_eager(cell: Cell) -> None:
    checks.check_compiled_equals_eager(cell.build(), backend="inductor")
