"""What all tests share: one thread, and shapes checked against their annotations."""

import pkgutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from jaxtyping import config, install_import_hook

from tests.assets import demand

torch.set_num_threads(1)
# torch.compile builds a `Prepared` inside of the graph, and cannot see through the constructor that the hook makes.
ATTENTION = Path(find_spec("thresher").submodule_search_locations[0]) / "attention"
PARTS = [m.name for m in pkgutil.iter_modules([str(ATTENTION)]) if m.name != "prepared"]
install_import_hook([*(f"thresher.attention.{m}" for m in PARTS), "thresher.budget.calibration"], "beartype.beartype")


def pytest_itemcollected(item: pytest.Item) -> None:
    if " at 0x" in item.nodeid:
        raise pytest.UsageError(f"{item.nodeid}: an address in its id differs between the processes of a run; name it")


def pytest_runtest_setup(item: pytest.Item) -> None:
    demand(package for mark in item.iter_markers("asset") for package in mark.args)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Switch the shape checks off: torch.compile cannot trace them."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
