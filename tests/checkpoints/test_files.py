"""Files that are whole or not there, whatever stops the writing."""

import os
from pathlib import Path
from typing import IO

import pytest
import torch

from thresher.checkpoints import files


def test_a_file_that_is_replaced_is_whole_before_and_after(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_text(path, "one")
    seen: list[str] = []

    def write(file: IO[bytes]) -> None:
        file.write(b"tw")
        seen.append(path.read_text())
        file.write(b"o")

    files.write_atomically(path, write)
    assert seen == ["one"]
    assert path.read_text() == "two"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    files.write_with_checksum(path, lambda file: file.write(b"one"))

    def fail(file: IO[bytes]) -> None:
        file.write(b"t")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        files.write_with_checksum(path, fail)
    assert path.read_bytes() == b"one"
    assert files.is_sound(path)
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "a.ckpt.sha256"]


def test_a_full_disk_is_told_by_name(tmp_path: Path) -> None:
    link = tmp_path / "full.ckpt.partial"
    link.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write .*full\.ckpt \(No space left on device\)"):
        files.write_with_checksum(tmp_path / "full.ckpt", lambda file: torch.save({"w": torch.zeros(10_000)}, file))
    assert not (tmp_path / "full.ckpt").exists()


@pytest.mark.parametrize("size", [0, 1, -1])
def test_a_truncated_file_does_not_fit_its_checksum(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    files.write_with_checksum(path, lambda file: file.write(b"0123456789"))
    path.write_bytes(path.read_bytes()[:size])
    assert "do not fit the checksum in a.ckpt.sha256" in str(files.describe_damage(path))


def test_what_is_replaced_can_be_kept_with_its_checksum(tmp_path: Path) -> None:
    path, previous = tmp_path / "last", tmp_path / "previous"
    for content in (b"1", b"2", b"3"):
        files.write_with_checksum(path, lambda file, content=content: file.write(content), previous)
    assert (previous.read_bytes(), path.read_bytes()) == (b"2", b"3")
    assert files.is_sound(previous)
    path.write_bytes(b"damaged")
    files.write_with_checksum(path, lambda file: file.write(b"4"), previous)
    assert previous.read_bytes() == b"2", "a damaged file does not take the place of a sound one"


def test_no_moment_of_a_write_is_without_a_sound_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop after each rename in turn, as a kill would."""
    path, previous = tmp_path / "last", tmp_path / "previous"
    files.write_with_checksum(path, lambda file: file.write(b"0"), previous)
    files.write_with_checksum(path, lambda file: file.write(b"1"), previous)
    replace = os.replace
    stops = 0
    for stop in range(10):
        renames = iter(range(100))

        def counted(old: Path, new: Path, renames: object = renames, stop: int = stop) -> None:
            if next(renames) == stop:  # type: ignore[call-overload]
                raise KeyboardInterrupt
            replace(old, new)

        monkeypatch.setattr(os, "replace", counted)
        try:
            files.write_with_checksum(path, lambda file, stop=stop: file.write(b"new%d" % stop), previous)
        except KeyboardInterrupt:
            stops += 1
        monkeypatch.setattr(os, "replace", replace)
        assert files.is_sound(path)
        assert files.is_sound(previous)
        files.remove_leftovers(tmp_path)
        assert files.is_sound(path)
        assert not list(tmp_path.glob("*.partial"))
    assert stops == 4
