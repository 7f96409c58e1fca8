"""Each named sweep is a grid of overrides that train.py takes."""

from pathlib import Path

import pytest

from tests.running import CONF
from thresher.config import overrides
from thresher.tools.sweep.space import read_spaces


@pytest.mark.parametrize("path", sorted((CONF / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_space_is_understood(path: Path) -> None:
    cfg = overrides.compose_config(CONF, "sweep", [f"sweep={path.stem}"])
    spaces = read_spaces(cfg.overrides, cfg.spaces)
    assert len(spaces.grid()) >= 3 * len(spaces.members)
    for space in spaces.members:
        overrides.check(CONF, "train", [*space.fixed, *(p.text for p in space.varied)])
        overrides.compose_config(CONF, "train", [*next(space.grid()), "run.name=x", "run.dir=y"])


def test_a_list_that_yaml_parted_is_told() -> None:
    with pytest.raises(ValueError, match=r"1 is not an override; YAML parts values at commas.*'seed=0,1,2'"):
        read_spaces(["seed=0", 1, 2], {})  # type: ignore[list-item]
