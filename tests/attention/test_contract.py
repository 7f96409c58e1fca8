"""Every mechanism of `conf/attention` keeps the promises of the contract, in every pattern that it supports."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from omegaconf import OmegaConf

from tests.attention.configured import CONF, configured
from tests.shapes import OF_SHAPES, without_shape_checks
from thresher.attention import Mechanism, Pattern, available, find, hyperparameters
from thresher.testing import CONTRACT, Check, checks


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


def promises(cell: Cell) -> list[Check]:
    built = cell.build()
    return [check for check in CONTRACT if check.applies(built)]


@pytest.mark.parametrize(
    ("cell", "check"),
    [pytest.param(cell, check, id=f"{cell}-{check.name}") for cell in SUPPORTED for check in promises(cell)],
)
def test_every_mechanism(cell: Cell, check: Check) -> None:
    with without_shape_checks(check.run not in OF_SHAPES):
        check.run(cell.build(**check.changes(cell.cls)))


@pytest.mark.parametrize("name", ["contract", "mechanism", "shared", "options", "__init__", "../latte"])
def test_a_file_without_a_mechanism_is_no_mechanism(name: str) -> None:
    with pytest.raises(ValueError, match="there is no attention"):
        find(name)


def test_every_mechanism_has_a_file_of_hyper_parameters() -> None:
    assert list(MAKERS) == available()


@pytest.mark.parametrize("name", MAKERS)
def test_the_yaml_repeats_the_constructor(name: str) -> None:
    make = MAKERS[name]
    written, defaults = hyperparameters_written(make), hyperparameters(find(name))
    assert written == defaults
    assert _types(written) == _types(defaults)
    for group in (written, *(each for each in written.values() if isinstance(each, dict))):
        own = defaults if group is written else next(d for d in defaults.values() if d == group)
        assert list(group) == list(own), "the YAML lists the hyper-parameters in another order"
    assert len(written) <= 8, "options that belong together make a group"


def hyperparameters_written(make: partial[Mechanism]) -> dict[str, object]:
    return {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in make.keywords.items()}


def _types(options: dict[str, object]) -> dict[str, object]:
    return {key: _types(value) if isinstance(value, dict) else type(value) for key, value in options.items()}


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
