"""What all tests share: one thread, and shapes checked against their annotations."""

from collections.abc import Iterator

import pytest
import torch
from jaxtyping import config, install_import_hook

from tests.assets import demand

torch.set_num_threads(1)
install_import_hook(["thresher.attention", "thresher.calibration"], "beartype.beartype")


def pytest_runtest_setup(item: pytest.Item) -> None:
    demand(package for mark in item.iter_markers("asset") for package in mark.args)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Switch the shape checks off: torch.compile cannot trace them."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
