"""Tokenizers: bytes, which need nothing, and any tokenizer of Hugging Face's by name or folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from thresher.installed import located


class Pairs(NamedTuple):
    """Pairs of texts as tokens.

    Attributes:
        ids: Of each pair.
        separator: The id whose first occurrence ends the first text, where the tokenizer tells the tokens of the second
            one apart (`token_type_ids`); else None.
    """

    ids: list[list[int]]
    separator: int | None


class Tokenizer(Protocol):
    """What turns text into token ids.

    Attributes:
        vocabulary: Number of ids; all are smaller.
        padding: The id that fills up sequences.
        mask: The id that stands for hidden tokens; None where there is none.
        first: The id that a sequence to be generated begins with.
        last: The id that it ends with.
    """

    vocabulary: int
    padding: int
    mask: int | None
    first: int
    last: int

    def encode(self, texts: Sequence[str], *, whole: bool, limit: int | None = None) -> list[list[int]]:
        """Return the ids of each text, the first `limit` of them; as a `whole` one, it gets its special tokens."""
        ...

    def encode_pairs(self, first: Sequence[str], second: Sequence[str], *, limit: int) -> Pairs:
        """Return the ids of pairs of texts, of which the longer one is cut until there are at most `limit`."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special ones left out."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return what each id stands for, special ones by a name in brackets."""
        ...


class ByteTokenizer:
    """UTF-8 bytes, shifted by one: id 0 is padding, 257 a mask, 258 and 259 begin and end a sequence."""

    vocabulary = 260
    padding = 0
    mask: int | None = 257
    first = 258
    last = 259

    def encode(self, texts: Sequence[str], *, whole: bool, limit: int | None = None) -> list[list[int]]:
        return [[byte + 1 for byte in text.encode()[:limit]] for text in texts]

    def encode_pairs(self, first: Sequence[str], second: Sequence[str], *, limit: int) -> Pairs:
        """Return the ids of pairs of texts, with a line break between them."""
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

    Args:
        name: Of a model on the hub, a folder with its files, or `package:NAME/FOLDER` inside an installed package.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        FileNotFoundError: There is no such tokenizer, or no network to get it by.
        ValueError: It has nothing that could serve as padding.
    """

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ModuleNotFoundError(
                f"data.tokenizer={name} needs transformers: pip install 'thresher[hf]', or use data.tokenizer=bytes"
            ) from error
        name = located(name)
        try:
            self._inner: Any = AutoTokenizer.from_pretrained(
                name, local_files_only=Path(name).is_dir(), trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"there is no tokenizer {name!r}, neither as a folder nor, as far as the network reaches, on the hub; "
                "data.tokenizer takes `bytes`, a folder with tokenizer.json, or a name on the hub"
            ) from error
        if getattr(self._inner, "backend_tokenizer", None) is not None:
            # Some files tell the tokenizer to pad and truncate by itself.
            self._inner.backend_tokenizer.no_padding()
            self._inner.backend_tokenizer.no_truncation()
        self.vocabulary = len(self._inner)
        ends = (self._inner.eos_token_id, self._inner.sep_token_id)
        last = next((i for i in ends if i is not None), None)
        padding = self._inner.pad_token_id if self._inner.pad_token_id is not None else last
        if padding is None:
            raise ValueError(f"the tokenizer {name!r} has neither a padding nor an end token to fill up sequences with")
        begins = (self._inner.bos_token_id, self._inner.cls_token_id)
        self.padding: int = padding
        self.mask: int | None = self._inner.mask_token_id
        self.last: int = padding if last is None else last
        self.first: int = next((i for i in begins if i is not None), self.last)

    def encode(self, texts: Sequence[str], *, whole: bool, limit: int | None = None) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self._inner(
            list(texts), add_special_tokens=whole, truncation=limit is not None, max_length=limit, verbose=False
        )["input_ids"]
        _check_room(ids, limit)
        return ids

    def encode_pairs(self, first: Sequence[str], second: Sequence[str], *, limit: int) -> Pairs:
        """Return the ids of pairs of texts as the tokenizer joins them; a line break joins them where it would not."""
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
            split_special_tokens=True,  # what looks like a separator inside a text is text
            verbose=False,
        )
        _check_room(found["input_ids"], limit)
        return Pairs(found["input_ids"], _separator(found["input_ids"], found["token_type_ids"]))

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._inner.decode(list(ids), skip_special_tokens=True)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        pieces: list[str] = self._inner.convert_ids_to_tokens(list(ids))
        return pieces


def _check_room(ids: Sequence[Sequence[int]], limit: int | None) -> None:
    if limit is not None and (longest := max(map(len, ids))) > limit:
        raise ValueError(
            f"data.length={limit} has no room for the special tokens of this tokenizer, let alone text: its shortest "
            f"cut has {longest} tokens"
        )


def _separator(ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]]) -> int | None:
    """Return the id after whose first occurrence all types are 1 and before which all are 0; None if all are 0.

    Raises:
        ValueError: Types are of another kind.
    """
    row = next((i for i, kinds in enumerate(types) if any(kinds)), None)
    if row is None:
        return None
    separator = ids[row][types[row].index(1) - 1] if 1 in types[row][1:] else None
    for own, kinds in zip(ids, types, strict=True):
        end = own.index(separator) + 1 if separator in own else len(own)
        if any(kinds[:end]) or any(kind != 1 for kind in kinds[end:]):
            raise ValueError(
                "this tokenizer tells the two texts of a pair apart by more than what stands between them; set "
                "data.tokenizer to another one"
            )
    return separator


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer called `name`: `bytes`, a folder, or a name on the hub."""
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)
