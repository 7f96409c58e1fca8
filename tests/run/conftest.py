"""A run that several tests read."""

from pathlib import Path

import pytest

from tests.running import tiny_config
from thresher.run import train as training


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("runs") / "latte"
    return folder, training.train(tiny_config(folder, "compute.target=0.5"))
