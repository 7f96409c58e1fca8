"""Where the tests of an installed library come from: its source distribution, or a folder that the user names."""

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

from tests.peers.families import Family

# Mixins that transformers' common tests import, and that the distribution leaves out.
_LEFT_OUT = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


class NoTests(Exception):
    """There are no tests of this version of a library here."""


def root_of(library: str, out: Path, given: Path | None) -> Path:
    """Return the folder that holds the `tests` of `library`, fetched into `out` if none is given.

    Raises:
        NoTests: The folder has no tests, or the distribution cannot be fetched.
    """
    if given is not None:
        root = given.parent if given.name == "tests" else given
        if not (root / "tests").is_dir():
            raise NoTests(f"{given} has no folder tests: give a checkout of {library} {version(library)}")
        return root.resolve()
    name = f"{library}-{version(library)}"
    root = out / "sources" / name
    if not (root / "tests").is_dir():
        archive = _download(library, out / "sources")
        with tarfile.open(archive) as tar:
            tar.extractall(root.parent, filter="data")
        archive.unlink()
        if not (root / "tests").is_dir():
            raise NoTests(
                f"the source distribution of {name} has no tests; give a checkout of it by --tests {library}=PATH"
            )
    return root.resolve()


def complete(root: Path, family: Family) -> None:
    """Write a family's file of tests where the distribution leaves it out: common tests over small models of ours.

    Raises:
        NoTests: The file is missing and cannot be stood in for.
    """
    file = root / family.file
    if file.exists():
        return
    common = root / "tests" / "test_modeling_common.py"
    if not family.cases or not common.exists():
        raise NoTests(
            f"{root} has no {family.file}: give a checkout of {family.library} by --tests {family.library}=PATH"
        )
    for name, mixin in _LEFT_OUT.items():
        _write(root / "tests" / name, f"class {mixin}:\n    pass\n", if_missing=True)
    for folder in {
        root / "tests",
        file.parent.parent,
        file.parent,
        *((root / "tests" / name).parent for name in _LEFT_OUT),
    }:
        _write(folder / "__init__.py", "", if_missing=True)
    cases = "".join(f"Test_{name} = case({name!r})\n" for name in family.cases)
    _write(file, f"from peers_suite import case\n\n{cases}")


def _write(path: Path, text: str, *, if_missing: bool = False) -> None:
    if not (if_missing and path.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _download(library: str, folder: Path) -> Path:
    wanted = f"{library}=={version(library)}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    done = subprocess.run([*command, "--quiet", "--dest", str(folder), wanted], capture_output=True, text=True)
    archives = sorted(folder.glob(f"{library}-*.tar.gz"))
    if done.returncode or not archives:
        raise NoTests(
            f"pip cannot fetch the source of {wanted}; give its tests by --tests {library}=PATH\n{done.stderr}"
        )
    return archives[0]
