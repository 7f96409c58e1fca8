"""Tokenizers: bytes, which need nothing, and any tokenizer of Hugging Face's by name or folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from thresher.installed import located


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
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._inner.decode(list(ids), skip_special_tokens=True)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        pieces: list[str] = self._inner.convert_ids_to_tokens(list(ids))
        return pieces


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer called `name`: `bytes`, a folder, or a name on the hub."""
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)
