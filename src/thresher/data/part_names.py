"""Find the part of the data, train, val or test, by the names of files and folders."""

import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from thresher.data.summary import PARTS

PART_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


def find_part(name: str) -> str | None:
    """Find the part that a name without ending means, in any case; None if it means none."""
    return next((part for part, names in PART_NAMES.items() if name.lower() in names), None)


def sort_by_part(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Sort files by the part that they or their folders are named after; leave out files without such a name.

    The whole name counts, `train.txt`; if every file has such a word, also the first or last word, as in
    `wiki.train.txt` and `test-00001.txt`.

    Args:
        paths: The files, relative to their common folder.

    Returns:
        Files by part; empty if no name means a part.

    Raises:
        ValueError: Names contradict each other, or there are parts but not `train`.
    """
    words = {path: [*path.parent.parts, path.stem] for path in paths}
    if not any(find_part(word) for some in words.values() for word in some):
        words = {path: re.split(r"[._-]", path.stem) for path in paths}
        words = {path: [some[0], some[-1]] for path, some in words.items()}
        if not all(any(map(find_part, some)) for some in words.values()):
            return {}
    said = {path: [word for word in some if find_part(word)] for path, some in words.items()}
    found: dict[str, list[Path]] = {}
    spelled: dict[str, dict[frozenset[str], Path]] = {}
    for path, some in said.items():
        parts = {find_part(word) for word in some}
        if len(parts) > 1:
            raise ValueError(f"{path} is named after {' and '.join(sorted(map(str, parts)))}: rename it")
        for part in map(str, parts):
            spelled.setdefault(part, {})[frozenset(word.lower() for word in some)] = path
            found.setdefault(part, []).append(path)
    for part, spellings in spelled.items():
        for (one, path), (other, another) in combinations(spellings.items(), 2):
            if one.isdisjoint(other):
                both = f"{path} and {another} are both named after {part}"
                raise ValueError(f"{both}: give one of them another name, or remove it")
    if found and "train" not in found:
        first = next(path for part in PARTS for path in found.get(part, []))
        raise ValueError(
            f"{first} is named after {find_part(said[first][0])}, but nothing is named "
            f"{' or '.join(PART_NAMES['train'])}: name what to train on, or rename it"
        )
    return found
