"""A corpus of one's own: names that say what files are, and what becomes of short documents."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from thresher.data.corpus import IGNORED, Short, Windows
from thresher.data.part_names import sort_by_part
from thresher.data.text_corpus import TextCorpus
from thresher.data.tokens import ByteTokenizer

BYTES = ByteTokenizer()
PARTS = ("train", "val", "test")


def corpus(root: Path, **settings: Any) -> TextCorpus:
    data = TextCorpus(**({"root": str(root), "context": 20} | settings))
    data.prepare_data()
    data.setup("fit")
    return data


def written(root: Path, *names: str) -> dict[str, str]:
    """Write files that repeat a letter of their own, and return the letters."""
    letters = {name: chr(ord("a") + i) for i, name in enumerate(names)}
    for name, letter in letters.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(letter * 400)
    return letters


def letters(data: TextCorpus) -> dict[str, str]:
    """Return which letters each part predicts."""
    tokens = {part: torch.cat([targets for _, targets in data.get_part(part)]).tolist() for part in PARTS}  # type: ignore[misc]
    return {part: "".join(sorted(set(BYTES.decode(some)))) for part, some in tokens.items()}


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("train.txt", "valid.txt", "test.txt"), ("a", "b", "c")),
        (("TRAIN.TXT", "Dev.txt", "Test.TXT"), ("a", "b", "c")),
        (("training.md", "validation.txt", "testing.md"), ("a", "b", "c")),
        (("train/1.txt", "train/2.txt", "val/1.txt", "test/1.txt", "test/deep/2.txt"), ("ab", "c", "de")),
        (("x/train/1.txt", "x/valid.txt", "y/train.txt", "y/test.txt"), ("ac", "b", "d")),
        (("wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"), ("a", "b", "c")),
        (("train-00001.txt", "train-00002.txt", "dev-1.txt", "test-1.txt"), ("ab", "c", "d")),
        (("train.txt", "valid.txt", "test.txt", "README.md"), ("a", "b", "c")),
        (("train.txt", "test.txt"), ("a", "a", "b")),
        (("train/train.txt", "valid/val.txt", "test/test.txt"), ("a", "b", "c")),
        (("train/training.txt", "valid/1.txt", "valid/val.txt", "test/test.txt"), ("a", "bc", "d")),
        (("train/1.txt", "train/2.txt", "train/3.txt", "val/1.txt"), None),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_files_and_folders_that_are_named_after_a_part_are_it(
    tmp_path: Path, names: tuple[str, ...], parts: tuple[str, ...] | None, seed: int
) -> None:
    written(tmp_path, *names)
    data = corpus(tmp_path, seed=seed)
    found = letters(data)
    if parts is None:  # what is missing is held out of the training files, whole
        assert found["val"] == "d"
        assert len(found["test"]) == 1
        assert sorted(found["train"] + found["test"]) == ["a", "b", "c"]
    else:
        assert found == dict(zip(PARTS, parts, strict=True))
    source = {part.name: part.source for part in data.summary()}
    first = next(name for name in names if "val" in name.lower() or "dev" in name.lower() or "test" in name.lower())
    part = "test" if "test" in first.lower() else "val"
    assert f"by name: {first}" in source[part]


def test_what_no_name_puts_in_a_part_is_counted_as_left_out(tmp_path: Path) -> None:
    written(tmp_path, "train.txt", "valid.txt", "test.txt", "README.md", ".cache/x.txt", "._train.txt", "data.bin")
    (train, *_) = corpus(tmp_path).summary()
    assert train.left_out == {
        "hidden files": 2,
        "files that do not end in .txt or .md": 1,
        "files that are not named after a part": 1,
    }


@pytest.mark.parametrize("names", [("1.txt", "2.txt", "3.txt"), ("the_test_of_time.txt", "training.day.txt", "b.txt")])
def test_other_names_say_nothing(names: tuple[str, ...]) -> None:
    assert sort_by_part([Path(name) for name in names]) == {}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("train.txt", "training.txt", "test.txt"), "train.txt and training.txt are both named after train: give one"),
        (("train.txt", "val/1.txt", "validation/1.txt"), "val/1.txt and validation/1.txt are both named after val"),
        (("train.txt", "valid/val.txt", "dev/1.txt"), "dev/1.txt and valid/val.txt are both named after val"),
        (("test.txt", "1.txt", "2.txt"), "test.txt is named after test, but nothing is named train or training"),
        (("dev.txt", "1.txt"), "dev.txt is named after val, but nothing is named train"),
        (("test/train.txt", "train/1.txt"), "test/train.txt is named after test and train: rename it"),
    ],
)
def test_names_that_contradict_each_other_are_refused(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    written(tmp_path, *names)
    with pytest.raises(ValueError, match=said) as caught:
        corpus(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_file_is_read_once_whatever_links_to_it(tmp_path: Path) -> None:
    written(tmp_path, "1.txt", "2.txt", "3.txt")
    os.symlink(tmp_path / "1.txt", tmp_path / "4.txt")
    os.symlink(tmp_path, tmp_path / "loop")
    data = corpus(tmp_path)
    assert sorted("".join(letters(data).values())) == ["a", "b", "c"]
    assert data.summary()[0].left_out == {
        "links to a file that is read anyway": 1,
        "links to a folder that is read anyway": 1,
    }


def test_what_links_to_folders_lead_to_is_read_once(tmp_path: Path) -> None:
    written(tmp_path, "root/1.txt", "root/own/2.txt", "else/3.txt", "else/deep/4.txt", "root/.hidden/5.txt")
    os.symlink(tmp_path / "root" / "own", tmp_path / "root" / "again")
    os.symlink(tmp_path / "else", tmp_path / "root" / "link")
    os.symlink(tmp_path / "else" / "deep", tmp_path / "root" / "z")
    os.symlink(tmp_path, tmp_path / "else" / "above")
    os.symlink(tmp_path / "else", tmp_path / "else" / "loop")
    os.symlink(tmp_path / "lost", tmp_path / "root" / "nowhere")
    os.symlink(tmp_path / "else", tmp_path / "root" / ".else")
    os.symlink(tmp_path / "root", tmp_path / "by link")
    for root in ("root", "by link"):
        data = corpus(tmp_path / root)
        assert sorted("".join(letters(data).values())) == ["a", "b", "c", "d"]
        assert data.summary()[0].left_out == {
            "links to a folder that is read anyway": 4,
            "links that lead nowhere or are hidden": 2,
            "hidden files": 1,
        }


@pytest.mark.parametrize(
    ("names", "of"),
    [(("train.txt",), "train.txt in"), (("train/1.txt", "train/2.txt"), "each of train/1.txt, train/2.txt in")],
)
def test_a_source_names_the_files_whose_ends_are_held_out(tmp_path: Path, names: tuple[str, ...], of: str) -> None:
    written(tmp_path, *names, "test.txt")
    source = {part.name: part.source for part in corpus(tmp_path).summary()}
    assert source["train"] == f"the beginning of {of} {tmp_path}"
    assert source["val"] == f"the last 0.1 of {of} {tmp_path}, data.held_out"


def test_marks_and_line_ends_are_no_text_and_other_encodings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbf" + b"one\r\ntwo\r" * 50)
    data = corpus(tmp_path)
    assert BYTES.decode(data.get_part("train").works[0].tolist()).startswith("one\ntwo\none")
    for content, said in ((b"a\nb\0", "line 2: a NUL byte"), ("é".encode("utf-16"), "not UTF-8 text but UTF-16")):
        (tmp_path / "a.TXT").write_bytes(content)
        with pytest.raises(ValueError, match=said):
            corpus(tmp_path)


DOCUMENTS = [5, 1, 30, 2, 9, 47, 3, 12]


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Return a folder of training documents of different lengths, each of a letter of its own."""
    for i, length in enumerate(DOCUMENTS):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / f"{i}.txt").write_text(chr(ord("a") + i) * length)
        (tmp_path / "test").mkdir(exist_ok=True)
        (tmp_path / "test" / f"{i}.txt").write_text(chr(ord("a") + i) * length)
    (tmp_path / "valid.txt").write_text("x" * 50)
    return tmp_path


def predicted(windows: Windows) -> list[int]:
    targets = torch.cat([targets for _, targets in windows])  # type: ignore[misc]
    return targets[targets != IGNORED].tolist()


@pytest.mark.parametrize(("short", "left"), [("pack", 0), ("pad", 1), ("drop", 4)])
def test_short_documents_are_packed_padded_or_dropped(documents: Path, short: Short, left: int) -> None:
    context = 8
    data = corpus(documents, context=context, short=short)
    train = data.get_part("train")
    text = BYTES.decode(predicted(train))
    whole = [chr(ord("a") + i) * length for i, length in enumerate(DOCUMENTS)]
    if short == "pack":
        joined: list[int] = []
        for each in whole:
            joined += [*BYTES.encode([each], whole=False)[0], BYTES.last]
        joined.pop()
        full = (len(joined) - 1) // context * context
        assert predicted(train) == joined[1 : full + 1]
        assert all(len(targets) == context for _, targets in train)  # type: ignore[misc]
    elif short == "pad":
        assert text == "".join(each[1:] for each in whole)
        inputs, targets = data.collate([train[i] for i in range(len(train))])
        assert isinstance(inputs, torch.Tensor)
        assert torch.equal(inputs == BYTES.padding, targets == IGNORED)
    else:
        assert text == "".join(each[1 : (len(each) - 1) // context * context + 1] for each in whole)
    summary = data.summary()[0]
    assert sum(summary.left_out.values()) == left
    assert summary.tokens_read == sum(DOCUMENTS) + (len(DOCUMENTS) - 1 if short == "pack" else 0)
    assert summary.tokens_used == len(predicted(train)) + len({work for work, _ in train.starts})
    test = [BYTES.decode(targets.tolist()) for _, targets in data.get_part("test")]  # type: ignore[misc]
    assert "".join(test) == "".join(each[1:] for each in whole), (
        "documents are tested one by one, whatever the training"
    )
    assert all(len(set(window)) == 1 for window in test)


@pytest.mark.parametrize("objective", ["masked", "denoising"])
@pytest.mark.parametrize("short", ["pack", "pad", "drop"])
def test_every_objective_trains_on_short_documents(documents: Path, objective: Any, short: Short) -> None:
    data = corpus(documents, context=8, short=short, objective=objective, batch_size=4)
    for _, targets in data.train_dataloader():
        assert (targets != IGNORED).any(1).all()


def test_documents_that_are_all_too_short_are_refused_with_what_helps(documents: Path) -> None:
    with pytest.raises(ValueError, match=r"train texts .* shorter than data.context=60; data.short=pack joins them"):
        corpus(documents, context=60, short="drop")
    assert len(corpus(documents, context=60).get_part("train")) == 1
    (documents / "valid.txt").write_text("x")
    with pytest.raises(ValueError, match=r"the val texts of TextCorpus have fewer than 2 tokens each"):
        corpus(documents)
    with pytest.raises(ValueError, match=r"data.short must be one of pack, pad, drop"):
        corpus(documents, short="keep")
