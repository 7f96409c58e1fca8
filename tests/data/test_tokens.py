"""Tokenizers: bytes, and Hugging Face's from a folder."""

from pathlib import Path

import pytest
import transformers

from tests.data.tokenizer import save_tokenizer
from thresher.data.tokens import load_tokenizer


def test_bytes_come_back_as_the_text() -> None:
    tokenizer = load_tokenizer("bytes")
    text = "Où est-ce? 你好"
    (ids,) = tokenizer.encode([text], whole=True)
    assert tokenizer.decode([tokenizer.first, *ids, tokenizer.last, tokenizer.padding]) == text
    assert len(ids) == len(text.encode())
    assert tokenizer.padding not in ids
    assert max(*ids, tokenizer.mask or 0, tokenizer.first, tokenizer.last) < tokenizer.vocabulary
    assert tokenizer.encode([text, "ab"], whole=True, limit=1)[1] == tokenizer.encode(["a"], whole=True)[0]


def test_a_folder_of_hugging_faces_that_pads_and_truncates_by_itself_does_neither_here(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path)))
    short, long = tokenizer.encode(["the cat", "the cat sat on the mat " * 5], whole=True)
    assert len(short) == 4
    assert len(long) == 32
    assert tokenizer.decode(short) == "the cat"
    assert tokenizer.encode(["the cat"], whole=False) == [short[1:-1]]
    assert len(tokenizer.encode(["the cat sat on the mat"], whole=True, limit=5)[0]) == 5
    assert (short[0], short[-1]) == (tokenizer.first, tokenizer.last)
    assert tokenizer.mask is not None
    assert max(long) < tokenizer.vocabulary


@pytest.mark.parametrize("kind", ["bytes", "fast", "no encodings"])
def test_texts_are_cut_and_counted_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else str(save_tokenizer(tmp_path)))
    if kind == "no encodings":  # as of tokenizers that are written in Python
        monkeypatch.setattr(transformers.BatchEncoding, "encodings", None)
    texts = ["the cat sat on the mat " * n for n in (9, 1, 3)]
    texts += ["the cat", "a man ate", "a man [PAD] ate it all", "[PAD] " * 7, "the cat sat on a mat all [PAD]"]
    ids, lengths = tokenizer.encode_counted(texts, limit=5)
    assert ids == tokenizer.encode(texts, whole=True, limit=5)
    assert lengths == [len(each) for each in tokenizer.encode(texts, whole=True)]
    assert tokenizer.encode_counted([], limit=5) == ([], [])


@pytest.mark.parametrize(
    ("limit", "text"), [(99, "abcdefgh\nxyz"), (10, "abcdef\nxyz"), (6, "abc\nxy"), (2, "a\n"), (1, "\n")]
)
def test_pairs_of_bytes_are_cut_where_they_are_longer(limit: int, text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    (ids,), separator = tokenizer.encode_pairs(["abcdefgh"], ["xyz"], limit=limit)
    assert tokenizer.decode(ids) == text
    assert separator is None
    (other,), _ = tokenizer.encode_pairs(["xyz"], ["abcdefgh"], limit=limit)
    assert len(other) == len(ids)


def test_pairs_are_joined_as_the_tokenizer_does(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path)))
    first, second = ["the cat sat", "a man", ""], ["on the mat", "who ate it all [SEP] to", "the dog"]
    ids, separator = tokenizer.encode_pairs(first, second, limit=8)
    words = [" ".join(tokenizer.pieces(each)) for each in ids]
    assert words[0] == "[CLS] the cat [SEP] on the mat [SEP]"  # one word too many, taken from the text that was longer
    assert words[1].startswith("[CLS] a man [SEP] who ate it [SEP]")
    assert words[2] == "[CLS] [SEP] the dog [SEP]"
    assert separator == ids[0][3]
    (whole,), _ = tokenizer.encode_pairs(first[1:2], second[1:2], limit=99)
    assert whole.count(separator) == 2  # not the one that the text seems to hold
    with pytest.raises(ValueError, match=r"data\.length=2 has no room for the special tokens"):
        tokenizer.encode_pairs(first, second, limit=2)
    with pytest.raises(ValueError, match=r"data\.length=1 has no room for the special tokens"):
        tokenizer.encode(first, whole=True, limit=1)


@pytest.mark.parametrize(
    ("pair", "joined", "separates"),
    [
        ("[CLS] $A [SEP] $B [SEP]", "[CLS] the cat [SEP] a dog [SEP]", False),
        (
            "[CLS] $A $B",
            "[CLS] the cat a dog [SEP]",
            False,
        ),  # as a single text: with a line break, which is no word here
        ("[CLS] $A [SEP] [SEP] $B [SEP]", "[CLS] the cat [SEP] [SEP] a dog [SEP]", False),
        ("$A [SEP] $B:1 [SEP]:1 [CLS]:1", "the cat [SEP] a dog [SEP] [CLS]", True),
    ],
)
def test_other_ways_to_join_pairs(tmp_path: Path, pair: str, joined: str, separates: bool) -> None:
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path, pair)))
    (ids,), separator = tokenizer.encode_pairs(["the cat"], ["a dog"], limit=20)
    assert " ".join(tokenizer.pieces(ids)) == joined
    assert (separator is not None) == separates


def test_types_that_a_separator_does_not_tell_are_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path, "[CLS]:2 $A [SEP] $B:1 [SEP]:1")))
    with pytest.raises(ValueError, match=r"by more than a separator; set data\.tokenizer"):
        tokenizer.encode_pairs(["the cat"], ["a dog"], limit=20)


def test_what_is_no_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer '.*empty'.*data\.tokenizer takes `bytes`"):
        load_tokenizer(str(tmp_path / "empty"))
