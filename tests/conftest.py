"""What all tests share: one thread, and shapes checked against their annotations."""

from collections.abc import Iterator

import pytest
import torch
from jaxtyping import config, install_import_hook

torch.set_num_threads(1)
install_import_hook(["thresher.attention", "thresher.calibration"], "beartype.beartype")


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Switch the shape checks off: torch.compile cannot trace them."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
