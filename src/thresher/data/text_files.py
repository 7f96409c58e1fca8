"""Labelled texts in files of one's own: CSV, TSV or JSON lines with a text and a label column."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch

from thresher.data.text import TextClassificationData, Texts

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")


class TextFiles(TextClassificationData):
    """Texts from one file for each part. Classes are the labels that occur in training, in alphabetical order.

    Args:
        train: File of the training texts: .csv or .tsv with a header, or .jsonl.
        test: File of the test texts; None holds out a share `val_fraction` of the training texts.
        val: File of the validation texts; None holds out a share `val_fraction` of the training texts.
        text: Name of the column of texts.
        label: Name of the column of labels.
        batch_size: See `TextClassificationData`, as for the others.
        workers: Processes that load data.
        seed: Of the split and the order.
        val_fraction: Share of the training texts held out for validation.
        limit_train: Train on the first so many of the training texts.
        length: Tokens of a text that are read.
        tokenizer: `bytes`, or a tokenizer of Hugging Face's.
    """

    def __init__(
        self,
        *,
        train: str,
        test: str | None = None,
        val: str | None = None,
        text: str = "text",
        label: str = "label",
        batch_size: int = 32,
        workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        limit_train: int | None = None,
        length: int = 512,
        tokenizer: str = "bytes",
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            workers=workers,
            seed=seed,
            val_fraction=val_fraction,
            limit_train=limit_train,
            length=length,
            tokenizer=tokenizer,
        )
        self.files = {"train": train, "val": val, "test": test}
        self.columns = (text, label)

    def read_texts(self) -> tuple[list[str], dict[str, Texts]]:
        """Read the files."""
        rows = {part: read_rows(Path(p).expanduser(), *self.columns) for part, p in self.files.items() if p is not None}
        names = sorted({label for _, label in rows["train"]})
        number = {name: i for i, name in enumerate(names)}
        parts = {}
        for part, some in rows.items():
            if unknown := sorted({label for _, label in some} - number.keys()):
                raise ValueError(f"{self.files[part]} has labels that training does not: {', '.join(unknown[:10])}")
            parts[part] = Texts([text for text, _ in some], [number[label] for _, label in some])
        if "test" not in parts:
            parts["train"], parts["test"] = self._hold_out(parts["train"])
        return names, parts

    def _hold_out(self, train: Texts) -> tuple[Texts, Texts]:
        order = torch.randperm(len(train.texts), generator=torch.Generator().manual_seed(self.seed + 1)).tolist()
        cut = round(self.val_fraction * len(order))
        left, held_out = (
            Texts([train.texts[i] for i in some], [train.labels[i] for i in some])
            for some in (order[cut:], order[:cut])
        )
        return left, held_out


def read_rows(path: Path, text: str, label: str) -> list[tuple[str, str]]:
    """Read (text, label) from a file, as its ending says.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has another ending, lacks a column, or a line cannot be read; the message says which.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; data.train, data.val and data.test each name one file")
    if path.suffix in DELIMITERS:
        rows, found = _table(path)
        if missing := [name for name in (text, label) if name not in found]:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}, only {', '.join(found) or 'none at all'}; "
                "name yours by data.text and data.label"
            )
    elif path.suffix in JSON_LINES:
        lines = _text(path).split("\n")
        rows = [(number, _parsed(path, number, line)) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'}; readable are .csv, .tsv, .jsonl and .ndjson")
    if not rows:
        raise ValueError(f"{path} holds no texts")
    return [_row(path, number, row, text, label) for number, row in rows]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it, for example with iconv") from error


def _table(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    """Return the rows of a file with the lines that they end at, and the names of its columns."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=DELIMITERS[path.suffix])
    try:
        return [(reader.line_num, row) for row in reader], list(reader.fieldnames or [])
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: not an object with a text and a label")
    return row


def _row(path: Path, number: int, row: dict[str, Any], text: str, label: str) -> tuple[str, str]:
    for name in (text, label):
        if row.get(name) is None or not str(row[name]).strip():
            raise ValueError(f"{path}, line {number}: {name} is missing or empty")
    return str(row[text]), str(row[label])
