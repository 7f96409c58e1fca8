"""Values written for Hydra's grammar come back as they were."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.overrides import parse, quoted


def read(text: str) -> object:
    (override,) = parse([f"run.dir={quoted(text)}"])
    return override.value()


@given(st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" '\\,=[]{}:~$#\""), min_size=1))
@settings(deadline=None)
def test_any_text_comes_back(text: str) -> None:
    assert read(text) == text


@pytest.mark.parametrize(
    "text", ["runs/größer", "C:\\runs\\a", "it's", "a\\'b", "ends in \\", "null", "1e3", "a,b", " a ", ""]
)
def test_what_paths_and_names_may_hold_comes_back(text: str) -> None:
    assert read(text) == text


def test_plain_paths_stay_as_they_are() -> None:
    assert quoted("runs/mine/2026-11-25_08-00-00") == "runs/mine/2026-11-25_08-00-00"
