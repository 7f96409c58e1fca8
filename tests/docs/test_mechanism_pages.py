"""Each mechanism has a page that lists its options with the defaults of today."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.running import CONF
from thresher.attention import available

PAGES = CONF.parent / "docs" / "mechanisms"


def list_options(node: dict[str, Any], prefix: str = "attention") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from list_options(value, f"{prefix}.{key}")
        elif not key.startswith("_"):
            yield f"{prefix}.{key}", value


@pytest.mark.parametrize("name", available())
def test_options_and_defaults_are_those_of_the_config(name: str) -> None:
    options = dict(list_options(yaml.safe_load((CONF / "attention" / f"{name}.yaml").read_text())))
    page = (PAGES / f"{name}.md").read_text()
    listed = re.findall(r"^\| `(attention\.[\w.]+)` \| `?([^|`]+)`? \|", page, flags=re.MULTILINE)
    assert {option: yaml.safe_load(default) for option, default in listed} == options


@pytest.mark.parametrize("name", available())
def test_each_page_shows_equation_and_results(name: str) -> None:
    page = (PAGES / f"{name}.md").read_text()
    assert "\n$$\n" in page
    assert "<!-- table: " in page or "](../results.md)" in page
