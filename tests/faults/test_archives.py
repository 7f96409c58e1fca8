"""Archives and pickles of arrays from strangers: only what is wanted of them is read, and nothing runs."""

import hashlib
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest

from thresher.data.archives import read_arrays, unpack


class Bomb:
    """Writes the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def archive_of(path: Path, inside: Path, member: tarfile.TarInfo, outside: Path) -> str:
    """Write an archive with one member and two that would land outside; return its SHA-256."""
    with tarfile.open(path, "w") as tar:
        tar.add(inside, "../outside")
        tar.add(inside, str(outside))
        tar.addfile(member)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_what_is_no_plain_file_is_refused(kind: bytes, tmp_path: Path) -> None:
    inside, outside, path = tmp_path / "inside", tmp_path / "outside", tmp_path / "x.tar"
    inside.write_text("content")
    member = tarfile.TarInfo("a")
    member.type, member.linkname = kind, str(inside)
    sha256 = archive_of(path, inside, member, outside)
    with pytest.raises(ValueError, match="not a plain file"):
        unpack(path, sha256, {"a": tmp_path / "into" / "a"})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["inside", "x.tar"]


def test_only_what_is_wanted_is_written_and_where_it_belongs(tmp_path: Path) -> None:
    inside, outside, path = tmp_path / "inside", tmp_path / "outside", tmp_path / "x.tar"
    inside.write_text("content")
    sha256 = archive_of(path, inside, tarfile.TarInfo("other"), outside)
    unpack(path, sha256, {"../outside": tmp_path / "into" / "a"})
    assert (tmp_path / "into" / "a").read_text() == "content"
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == [
        *("inside", "into", "into/a", "x.tar"),
    ]
    with pytest.raises(ValueError, match="holds no b"):
        unpack(path, sha256, {"b": tmp_path / "b"})
    with pytest.raises(ValueError, match="SHA-256"):
        unpack(path, "0" * 64, {})


def test_a_file_that_grows_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, inside = tmp_path / "x.tar.xz", tmp_path / "zeros"
    inside.write_bytes(bytes(10_001))
    with tarfile.open(path, "w:xz") as tar:
        tar.add(inside, "zeros")
    monkeypatch.setattr("thresher.data.archives.LARGEST", 10_000)
    with pytest.raises(ValueError, match="at most 10000 bytes"):
        unpack(path, hashlib.sha256(path.read_bytes()).hexdigest(), {"zeros": tmp_path / "out"})
    assert not (tmp_path / "out").exists()


def test_a_pickle_of_arrays_names_nothing_else(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(ValueError, match="which arrays do not need"):
        read_arrays(pickle.dumps({"data": Bomb(marker)}), tmp_path / "x")
    assert not marker.exists()
