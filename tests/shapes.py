"""Shapes are checked against their annotations in tests, which takes longer than the arithmetic of small inputs."""

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import config

from thresher.testing import checks

# The checks of the contract that take every path with every kind of call; the others need not check shapes again.
OF_SHAPES = (checks.check_shapes_and_costs, checks.check_sizes)


@contextmanager
def without_shape_checks(off: bool = True) -> Iterator[None]:
    """Switch the checks of shapes off, unless `off` is False."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", off or before)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)
