"""Files that are whole or not there: written beside their place, forced to the disk, renamed; with checksums.

A file is written to `NAME.partial` in the folder where it belongs, so that the rename never crosses a file system.
A checksum stands beside it as `NAME.sha256`, in the form that `sha256sum --check` reads. The two cannot be renamed
at once: between the renames the new checksum waits as `NAME.sha256.partial`, and is believed as well.
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
FOLDERS = 1000  # that are searched for what is near a file that is not there


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file that takes its place only once it is whole and on the disk.

    Raises:
        OSError: It could not be written; what stood in its place still does.
    """
    partial = _beside(path, PARTIAL)
    _write_partial(partial, path, write)
    os.replace(partial, path)
    _settle(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file that is whole or not there."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_checked(path: Path, write: Callable[[IO[bytes]], object], previous: Path | None = None) -> None:
    """Let `write` fill a file with a checksum beside it; keep what it replaces under another name, if one is given.

    At every moment each of the two names that is taken holds a whole file that its checksum fits.

    Raises:
        OSError: It could not be written; what stood in its place still does.
    """
    partial, checksum = _beside(path, PARTIAL), _beside(path, CHECKSUM)
    _write_partial(partial, path, write)
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if previous is not None and is_sound(path):
        _keep(path, previous)
    pending = _beside(checksum, PARTIAL)
    _write_partial(pending, checksum, lambda file: file.write(f"{digest}  {path.name}\n".encode()))
    os.replace(partial, path)
    os.replace(pending, checksum)
    _settle(path.parent)


def is_sound(path: Path) -> bool:
    """Say whether a file is there and fits the checksum beside it; one without checksum counts as sound."""
    return path.is_file() and (not (expected := _checksums(path)) or _digest(path) in expected)


def damage(path: Path) -> str | None:
    """Return what is wrong with a file, by its checksum, or None where nothing is or there is no checksum."""
    if is_sound(path):
        return None
    return f"{path.stat().st_size} bytes do not fit the checksum in {path.name}{CHECKSUM}"


def remove_checked(path: Path) -> None:
    """Remove a file and its checksum, where they are."""
    path.unlink(missing_ok=True)
    _beside(path, CHECKSUM).unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> list[str]:
    """Remove what interrupted writes left in a folder; return the names.

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


def no_checkpoint(path: Path) -> FileNotFoundError:
    """Return the error that says that a checkpoint is not there, and which are near it, the newest first."""
    folder = next((p for p in (path, *path.parents) if p.is_dir()), Path())
    found = [p for base, _, names in islice(os.walk(folder), FOLDERS) for p in map(Path(base).joinpath, names)]
    found = sorted((p for p in found if p.suffix == ".ckpt"), key=lambda p: p.stat().st_mtime, reverse=True)[:5]
    near = f"; near it: {', '.join(map(str, found))}" if found else ", and none below the nearest folder that exists"
    return FileNotFoundError(f"there is no checkpoint {path}{near}")


def _keep(path: Path, previous: Path) -> None:
    """Give a file and its checksum a second name, which then survives the replacement of the first.

    The checksum's link comes first: as a pending one it is believed from the moment when the file has its new name.
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
            # Of a link to the same file, a rename removes nothing.
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


def _settle(folder: Path) -> None:
    """Force renames in a folder to the disk, where the system knows how."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
