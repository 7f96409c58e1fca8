"""Read only the wanted files of archives, and only arrays of pickles."""

import hashlib
import io
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LARGEST = 2**29  # bytes of a file in an archive
ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),  # bytes, in pickles for Python 2 and 3
}


def unpack(archive: Path, sha256: str, wanted: Mapping[str, Path]) -> None:
    """Unpack some files of a tar archive, each to its path.

    Args:
        archive: The archive, compressed or not.
        sha256: Of the whole archive, in hexadecimal digits.
        wanted: The path of each file, by its name in the archive.

    Raises:
        ValueError: It is another archive, or a member is missing, not a plain file, or too large.
    """
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{archive} is damaged or another file: its SHA-256 is {found}, not {sha256}; delete it")
    with tarfile.open(archive) as tar:
        for name, path in wanted.items():
            try:
                member = tar.getmember(name)
            except KeyError as error:
                raise ValueError(f"{archive} holds no {name}") from error
            content = tar.extractfile(member) if member.isreg() and member.size <= LARGEST else None
            if content is None:
                raise ValueError(f"{name} in {archive} is not a plain file of at most {LARGEST} bytes: refused")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which arrays do not need")
        return super().find_class(module, name)


def read_arrays(data: bytes, source: Path) -> Any:
    """Read the arrays and plain values of a pickle.

    Raises:
        ValueError: It is not a pickle, or holds anything else.
    """
    try:
        return _ArraysOnly(io.BytesIO(data), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"{source} is not a pickle of arrays: {error}") from error
