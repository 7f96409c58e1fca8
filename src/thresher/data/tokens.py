"""Tokenizers: bytes, which need nothing, and any tokenizer of Hugging Face's by name or folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from thresher.config.packages import locate_model

FILLS = -1  # padding if every id of a tokenizer may occur in a text; models recognise it as negative
AS_TEXT = {"split_special_tokens": True}  # special tokens written inside a text are text


class Pairs(NamedTuple):
    """Pairs of texts as tokens.

    Attributes:
        ids: Of each pair.
        separator: The id whose first occurrence ends the first text, if the tokenizer marks the tokens of the second
            one (`token_type_ids`); else None.
    """

    ids: list[list[int]]
    separator: int | None


class Tokenizer(Protocol):
    """Turns text into token ids.

    Attributes:
        vocabulary: Number of ids; all are smaller.
        padding: The id of padding, which never occurs in a text; -1 if the tokenizer has no such id.
        mask: The id of hidden tokens; None without one.
        first: The first id of a generated sequence.
        last: The last id of a sequence.
    """

    vocabulary: int
    padding: int
    mask: int | None
    first: int
    last: int

    def encode(self, texts: Sequence[str], *, whole: bool, limit: int | None = None) -> list[list[int]]:
        """Encode each text to at most `limit` ids; a `whole` text gets its special tokens."""
        ...

    def encode_counted(self, texts: Sequence[str], *, limit: int) -> tuple[list[list[int]], list[int]]:
        """Encode each whole text to at most `limit` ids; return also the numbers before truncation."""
        ...

    def encode_pairs(self, first: Sequence[str], second: Sequence[str], *, limit: int) -> Pairs:
        """Encode pairs of texts to at most `limit` ids; the longer text is truncated first."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text, without special tokens."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Name the token of each id, special ones in brackets."""
        ...


class ByteTokenizer:
    """UTF-8 bytes, shifted by one: id 0 is padding, 257 the mask, 258 and 259 begin and end a sequence."""

    vocabulary = 260
    padding = 0
    mask: int | None = 257
    first = 258
    last = 259

    def encode(self, texts: Sequence[str], *, whole: bool, limit: int | None = None) -> list[list[int]]:
        return [[byte + 1 for byte in text.encode()[:limit]] for text in texts]

    def encode_counted(self, texts: Sequence[str], *, limit: int) -> tuple[list[list[int]], list[int]]:
        ids = self.encode(texts, whole=True)
        return [each[:limit] for each in ids], [len(each) for each in ids]

    def encode_pairs(self, first: Sequence[str], second: Sequence[str], *, limit: int) -> Pairs:
        """Encode pairs of texts with a line break between them."""
        (between,), room = self.encode(["\n"], whole=False)[0], limit - 1
        ids = []
        for a, b in zip(self.encode(first, whole=True), self.encode(second, whole=True), strict=True):
            of_a = max(room - len(b), room - room // 2)
            of_b = max(room - len(a), room // 2)
            ids.append([*a[:of_a], between, *b[:of_b]])
        return Pairs(ids, None)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - 1 for i in ids if 0 < i <= 256).decode(errors="replace")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        special = {0: "[padding]", 257: "[mask]", 258: "[first]", 259: "[last]"}
        return [special[i] if i in special else bytes([i - 1]).decode(errors="backslashreplace") for i in ids]


class HuggingFaceTokenizer:
    """A tokenizer of Hugging Face's.

    Many have no padding of their own and pad with the end token, which also occurs in texts. Padding is then -1, so
    that it never depends on a text.

    Args:
        name: Of a model on the hub, a folder with its files, a GGUF file, or `package:NAME/PATH` inside an installed
            package.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        FileNotFoundError: There is no such tokenizer, or the network cannot be reached.
        ValueError: It has no token to end a sequence with.
    """

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ModuleNotFoundError(
                f"data.tokenizer={name} needs transformers: pip install 'thresher[hf]', or use data.tokenizer=bytes"
            ) from error
        name, file = locate_model(name)
        try:
            self._inner: Any = AutoTokenizer.from_pretrained(
                name, local_files_only=Path(name).is_dir(), trust_remote_code=False, **file
            )
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"there is no tokenizer {name!r}, neither as a folder nor, as far as the network reaches, on the hub; "
                "data.tokenizer takes `bytes`, a folder with tokenizer.json, a GGUF file, or a name on the hub"
            ) from error
        if getattr(self._inner, "backend_tokenizer", None) is not None:
            # Some files make the tokenizer pad and truncate by itself.
            self._inner.backend_tokenizer.no_padding()
            self._inner.backend_tokenizer.no_truncation()
        self.vocabulary = len(self._inner)
        ends = (self._inner.eos_token_id, self._inner.sep_token_id, self._inner.pad_token_id)
        last = next((i for i in ends if i is not None), None)
        if last is None:
            raise ValueError(
                f"the tokenizer {name!r} has neither an end token nor a padding token to end sequences with"
            )
        begins = (self._inner.bos_token_id, self._inner.cls_token_id)
        self.mask: int | None = self._inner.mask_token_id
        self.last: int = last
        self.first: int = next((i for i in begins if i is not None), last)
        own = {self.first, self.last, self.mask, self._inner.unk_token_id, *ends[:2], *begins}
        padding = self._inner.pad_token_id
        self.padding: int = FILLS if padding is None or padding in own else padding
        self._unknown: int | None = self._inner.unk_token_id
        if (
            self._unknown is None
            and padding in self._encode_ids([f"a {self._inner.pad_token}"], False, None, **AS_TEXT)[0]
        ):
            self.padding = FILLS

    def encode(self, texts: Sequence[str], *, whole: bool, limit: int | None = None) -> list[list[int]]:
        if not texts:
            return []
        return self._finish(self._encode_ids(texts, whole, limit), texts, whole, limit)

    def encode_counted(self, texts: Sequence[str], *, limit: int) -> tuple[list[list[int]], list[int]]:
        if not texts:
            return [], []
        found = self._run_tokenizer(texts, True, limit)
        ids = self._finish(list(found["input_ids"]), texts, True, limit)
        if found.encodings is None:
            return ids, [len(each) for each in self.encode(texts, whole=True)]
        special = self._inner.num_special_tokens_to_add(pair=False)
        cut = [sum(len(more) - special for more in each.overflowing) for each in found.encodings]
        lengths = [len(each) + more for each, more in zip(found.encodings, cut, strict=True)]
        for i, text in enumerate(texts):
            if self._inner.pad_token and self._inner.pad_token in text:  # as text it has other tokens
                lengths[i] = len(self.encode([texts[i]], whole=True)[0])
        return ids, lengths

    def _finish(self, ids: list[list[int]], texts: Sequence[str], whole: bool, limit: int | None) -> list[list[int]]:
        """Read padding tokens written inside texts as text."""
        for i, each in enumerate(ids):
            if self.padding in each:
                ids[i] = self._encode_ids([texts[i]], whole, limit, **AS_TEXT)[0]
        _check_room(ids, limit)
        return self._replace_padding(ids)

    def _replace_padding(self, ids: list[list[int]]) -> list[list[int]]:
        """Replace padding ids inside a text by the unknown token, if the tokenizer has one."""
        unknown = self._unknown
        if unknown is None:
            return ids
        return [[unknown if i == self.padding else i for i in each] if self.padding in each else each for each in ids]

    def _encode_ids(self, texts: Sequence[str], whole: bool, limit: int | None, **options: bool) -> list[list[int]]:
        ids: list[list[int]] = self._run_tokenizer(texts, whole, limit, **options)["input_ids"]
        return ids

    def _run_tokenizer(self, texts: Sequence[str], whole: bool, limit: int | None, **options: bool) -> Any:
        cut = {"truncation": limit is not None, "max_length": limit}
        return self._inner(list(texts), add_special_tokens=whole, verbose=False, **cut, **options)

    def encode_pairs(self, first: Sequence[str], second: Sequence[str], *, limit: int) -> Pairs:
        """Encode pairs of texts as the tokenizer joins them; with a line break if it does not."""
        if not first:
            return Pairs([], None)
        if self._inner.num_special_tokens_to_add(pair=True) <= self._inner.num_special_tokens_to_add(pair=False):
            joined = [f"{a}\n{b}" for a, b in zip(first, second, strict=True)]
            return Pairs(self.encode(joined, whole=True, limit=limit), None)
        found = self._inner(
            list(first),
            list(second),
            truncation="longest_first",
            max_length=limit,
            return_token_type_ids=True,
            verbose=False,
            **AS_TEXT,
        )
        ids = self._replace_padding(found["input_ids"])
        _check_room(ids, limit)
        return Pairs(ids, _find_separator(ids, found["token_type_ids"]))

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._inner.decode([i for i in ids if i >= 0], skip_special_tokens=True)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        pieces: list[str] = self._inner.convert_ids_to_tokens([max(i, 0) for i in ids])
        return ["[padding]" if i < 0 else piece for i, piece in zip(ids, pieces, strict=True)]


def _check_room(ids: Sequence[Sequence[int]], limit: int | None) -> None:
    if limit is not None and (longest := max(map(len, ids))) > limit:
        raise ValueError(
            f"data.length={limit} has no room for the special tokens of this tokenizer, let alone text: its shortest "
            f"cut has {longest} tokens"
        )


def _find_separator(ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]]) -> int | None:
    """Find the id whose first occurrence separates types 0 from types 1; None if all are 0.

    Raises:
        ValueError: No id separates them.
    """
    row = next((i for i, kinds in enumerate(types) if any(kinds)), None)
    if row is None:
        return None
    separator = ids[row][types[row].index(1) - 1] if 1 in types[row][1:] else None
    for own, kinds in zip(ids, types, strict=True):
        end = own.index(separator) + 1 if separator in own else len(own)
        if any(kinds[:end]) or any(kind != 1 for kind in kinds[end:]):
            raise ValueError(
                "this tokenizer marks the two texts of a pair by more than a separator; set data.tokenizer to "
                "another one"
            )
    return separator


def load_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer `name`: `bytes`, a folder, or a name on the hub."""
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)
