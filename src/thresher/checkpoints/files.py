"""Write files atomically: beside their place, forced to the disk, then renamed; with checksums.

A file is written to `NAME.partial` in the folder where it belongs, so that the rename never crosses a file system.
Its checksum is `NAME.sha256`, in the format of `sha256sum --check`. The two cannot be renamed at once: between the
renames the new checksum is `NAME.sha256.partial`, and is valid as well.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO

PARTIAL = ".partial"
CHECKSUM = ".sha256"
MAX_FOLDERS = 1000  # to search for checkpoints near a missing one


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file that appears only when it is complete and on the disk.

    Raises:
        OSError: It could not be written; what stood in its place still does.
    """
    partial = _beside(path, PARTIAL)
    _write_partial(partial, path, write)
    os.replace(partial, path)
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_with_checksum(path: Path, write: Callable[[IO[bytes]], object], previous: Path | None = None) -> None:
    """Write a file with a checksum beside it; keep the file that it replaces under another name, if one is given.

    At any time each of the two names holds a complete file that fits its checksum, or no file.

    Raises:
        OSError: It could not be written; what stood in its place still does.
    """
    partial, checksum = _beside(path, PARTIAL), _beside(path, CHECKSUM)
    _write_partial(partial, path, write)
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if previous is not None and is_sound(path):
        _keep_previous(path, previous)
    pending = _beside(checksum, PARTIAL)
    _write_partial(pending, checksum, lambda file: file.write(f"{digest}  {path.name}\n".encode()))
    os.replace(partial, path)
    os.replace(pending, checksum)
    _sync_folder(path.parent)


def is_sound(path: Path) -> bool:
    """Tell whether a file exists and fits its checksum; a file without checksum counts as sound."""
    return path.is_file() and (not (expected := _checksums(path)) or _digest(path) in expected)


def describe_damage(path: Path) -> str | None:
    """Describe the damage of a file by its checksum; None without damage or checksum."""
    if is_sound(path):
        return None
    return f"{path.stat().st_size} bytes do not fit the checksum in {path.name}{CHECKSUM}"


def remove_with_checksum(path: Path) -> None:
    """Remove a file and its checksum, if they exist."""
    path.unlink(missing_ok=True)
    _beside(path, CHECKSUM).unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> list[str]:
    """Remove the leftovers of interrupted writes from a folder; return their names.

    A checksum that was about to be renamed is renamed, if it is that of its file.
    """
    removed = []
    for pending in sorted(folder.glob(f"*{CHECKSUM}{PARTIAL}")):
        checksum = pending.with_name(pending.name.removesuffix(PARTIAL))
        file = checksum.with_name(checksum.name.removesuffix(CHECKSUM))
        if file.is_file() and _digest(file) in _read(pending):
            os.replace(pending, checksum)
    for partial in sorted(folder.glob(f"*{PARTIAL}")):
        with suppress(FileNotFoundError):
            partial.unlink()
            removed.append(partial.name)
    return removed


def build_not_found_error(path: Path) -> FileNotFoundError:
    """Build the error for a checkpoint that does not exist; it names those nearby, the newest first."""
    folder = next((p for p in (path, *path.parents) if p.is_dir()), Path())
    found = [p for base, _, names in islice(os.walk(folder), MAX_FOLDERS) for p in map(Path(base).joinpath, names)]
    found = sorted((p for p in found if p.suffix == ".ckpt"), key=lambda p: p.stat().st_mtime, reverse=True)[:5]
    near = f"; near it: {', '.join(map(str, found))}" if found else f", and none in or below {folder.resolve()}"
    return FileNotFoundError(f"there is no checkpoint {path}{near}")


def _keep_previous(path: Path, previous: Path) -> None:
    """Give a file and its checksum a second name, which then survives the replacement of the first.

    The checksum is linked first, as a pending one, so that it is valid once the file has its new name.
    """
    names = ((_beside(path, CHECKSUM), _beside(previous, CHECKSUM)), (path, previous))
    for old, new in names:
        partial = _beside(new, PARTIAL)
        partial.unlink(missing_ok=True)
        if old.is_file():
            _link(old, partial)
    for _, new in reversed(names):
        partial = _beside(new, PARTIAL)
        if partial.is_file():
            os.replace(partial, new)
            # A rename onto a link to the same file removes nothing.
            partial.unlink(missing_ok=True)


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except OSError:  # a file system without hard links
        _write_partial(new, new, lambda file: file.write(old.read_bytes()))


def _write_partial(partial: Path, path: Path, write: Callable[[IO[bytes]], object]) -> None:
    watched = None
    try:
        with partial.open("wb") as file:
            watched = _Watched(file)
            write(watched)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        cause = watched.error if watched is not None and watched.error is not None else error
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"cannot write {path} ({cause.strerror})") from error
        raise


class _Watched:
    """A file that remembers why a write failed: torch.save reports a full disk as an internal error.

    Args:
        file: The file.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _checksums(path: Path) -> set[str]:
    checksum = _beside(path, CHECKSUM)
    if not checksum.is_file():
        return set()
    return _read(checksum) | _read(_beside(checksum, PARTIAL))


def _read(checksum: Path) -> set[str]:
    try:
        return {line.split()[0] for line in checksum.read_text(errors="replace").splitlines() if line.strip()}
    except OSError:
        return set()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _sync_folder(folder: Path) -> None:
    """Force renames in a folder to the disk, if the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
