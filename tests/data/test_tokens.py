"""Tokenizers: bytes, and Hugging Face's from a folder."""

from pathlib import Path

import pytest

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


def test_what_is_no_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer '.*empty'.*data\.tokenizer takes `bytes`"):
        load_tokenizer(str(tmp_path / "empty"))
