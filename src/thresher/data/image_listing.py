"""List the images below folders of classes, each file once, however many links lead to it.

Links to other places are followed. Links to files and folders that are read anyway are left out and counted, as are
hidden files and folders, and files without the extension of an image. No file is in two classes or two parts of the
data, under any name, hard links included.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from thresher.data.image_reading import is_image

Identity = tuple[int, int]  # device and inode
ALREADY = "other names of files and folders that are read already"


class FolderContents(NamedTuple):
    """The folders inside a folder.

    Attributes:
        folders: Their names, in order.
        left_out: Numbers of other entries, by kind.
    """

    folders: list[str]
    left_out: Counter[str]


class ImageList(NamedTuple):
    """The images of one part of the data.

    Attributes:
        paths: Their files, class by class, in order.
        labels: The class of each, from 0.
        files: Their paths by identity.
        left_out: Numbers of entries that are not read, by reason.
    """

    paths: list[Path]
    labels: list[int]
    files: dict[Identity, Path]
    left_out: Counter[str]


def list_folders(folder: Path) -> FolderContents:
    """List the folders directly inside a folder, without hidden ones and links back to it or above."""
    if not folder.is_dir():
        return FolderContents([], Counter())
    here = folder.resolve()
    names, left_out = [], Counter[str]()
    for entry in list_entries(folder):
        if entry.name.startswith("."):
            left_out[_describe_hidden(entry)] += 1
        elif not (os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()):  # a link may point to itself
            left_out["files beside the folders of classes"] += 1
        elif entry.is_symlink() and here.is_relative_to(Path(entry.path).resolve()):
            left_out[ALREADY] += 1
        else:
            names.append(entry.name)
    return FolderContents(sorted(names), left_out)


def list_images(folder: Path, classes: Sequence[str], others: Mapping[Identity, Path]) -> ImageList:
    """List the images of one part of the data.

    Args:
        folder: Holds a folder for each class.
        classes: Names of the classes.
        others: The files of parts that are already listed.

    Raises:
        ValueError: A file is also in another part or class, or cannot be reached.
    """
    walk = _Walk(folder)
    links: list[list[Path]] = [[] for _ in classes]
    direct = [list(walk.walk_folder(folder / name, aside)) for name, aside in zip(classes, links, strict=True)]
    own = {identity for found in direct for _, identity in found}
    files: dict[Identity, Path] = {}
    chosen: list[list[Path]] = []
    for found in direct:
        chosen.append([])
        for path, identity in found:
            if _is_new(path, identity, files, others, chosen[-1]):
                chosen[-1].append(path)
            else:
                walk.left_out[ALREADY] += 1
    for paths, aside in zip(chosen, links, strict=True):
        for path, identity in walk.walk_links(aside):
            if identity not in own and _is_new(path, identity, files, others, paths):
                paths.append(path)
            else:
                walk.left_out[ALREADY] += 1
    paths = [path for some in chosen for path in sorted(some)]
    labels = [label for label, some in enumerate(chosen) for _ in some]
    return ImageList(paths, labels, files, walk.left_out)


def _is_new(
    path: Path,
    identity: Identity,
    files: dict[Identity, Path],
    others: Mapping[Identity, Path],
    same_class: Sequence[Path],
) -> bool:
    """Tell whether a file is new, and remember it.

    Raises:
        ValueError: It is also in another part of the data or another class.
    """
    known = others.get(identity) or files.get(identity)
    if known is not None and not os.path.samefile(known, path):  # a folder may list other inodes than its files have
        identity = _identify(path.stat())
    if identity in others:
        raise ValueError(f"{path} and {others[identity]} are one file in two parts of the data: remove one of them")
    known = files.setdefault(identity, path)
    if known is path:
        return True
    if known not in same_class:
        raise ValueError(f"{path} and {known} are one file in two classes: remove one of them")
    return False


class _Walk:
    """A walk that enters each folder once.

    Args:
        folder: The start; it and the folders above it are never entered again.

    Attributes:
        left_out: Numbers of entries that are not images, by reason.
    """

    def __init__(self, folder: Path) -> None:
        real = folder.resolve()
        self.entered = {_identify(path.stat()) for path in (real, *real.parents)}
        self.left_out: Counter[str] = Counter()

    def walk_folder(self, start: Path, links: list[Path]) -> Iterator[tuple[Path, Identity]]:
        """Yield the images below a folder with their identities; add links to `links`."""
        self.entered.add(_identify(start.stat()))
        waiting = [start]
        while waiting:
            folder = waiting.pop()
            device, listed = folder.stat().st_dev, None
            for entry in list_entries(folder):
                path = folder / entry.name
                if entry.name.startswith("."):
                    self.left_out[_describe_hidden(entry)] += 1
                elif entry.is_symlink():
                    links.append(path)
                elif entry.is_dir():
                    waiting += [path] if self._enters(path.stat()) else []
                elif self._is_wanted(path, entry.is_file()):
                    if listed is None:  # whether the folder lists true inodes: FUSE mounts may not
                        listed = (device, entry.inode()) == _identify(path.stat())
                    yield path, (device, entry.inode()) if listed else _identify(path.stat())

    def walk_links(self, links: list[Path]) -> Iterator[tuple[Path, Identity]]:
        """Yield the images behind links with their identities; `links` grows by those found meanwhile."""
        for link in links:
            try:
                status = link.stat()
            except OSError as error:
                if is_image(link.name):
                    where = f"{link} is a link to {os.readlink(link)}, which cannot be reached"
                    raise ValueError(f"{where} ({error.strerror}); repair or remove it") from error
                self.left_out["links that lead nowhere"] += 1
                continue
            if stat.S_ISDIR(status.st_mode):
                if self._enters(status):
                    yield from self.walk_folder(link, links)
            elif self._is_wanted(link, stat.S_ISREG(status.st_mode)):
                yield link, _identify(status)

    def _enters(self, status: os.stat_result) -> bool:
        if _identify(status) in self.entered:
            self.left_out[ALREADY] += 1
            return False
        self.entered.add(_identify(status))
        return True

    def _is_wanted(self, path: Path, is_file: bool) -> bool:
        if is_file and is_image(path.name):
            return True
        ending = f"ending in {path.suffix.lower()}" if path.suffix else "without an extension"
        self.left_out[f"files {ending}" if is_file else "things that are neither file nor folder"] += 1
        return False


def list_entries(folder: Path) -> list[os.DirEntry[str]]:
    """List the entries of a folder by name.

    Raises:
        ValueError: It cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{folder} cannot be listed ({error.strerror}); make it readable or remove it") from error


def _describe_hidden(entry: os.DirEntry[str]) -> str:
    return "hidden folders" if entry.is_dir(follow_symlinks=False) else "hidden files"


def _identify(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino
