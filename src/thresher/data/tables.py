"""Read texts and labels from tables and JSON lines strictly: every row in full, or an error with its file and line."""

import csv
import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from thresher.data.encoding import read_text

Quoting = Literal["double", "none"]
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
ENDINGS = (*DELIMITERS, *JSON_LINES)
MISSING = ("nan", "<na>", "inf", "-inf")
KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


class Row(NamedTuple):
    """A labelled text.

    Attributes:
        line: The line of the file where it begins.
        text: The text, unchanged.
        label: The name of its class, see `normalise_label`.
    """

    line: int
    text: str
    label: str


class Record(NamedTuple):
    """The fields of a row of a table, and its lines in the file."""

    line: int
    fields: list[str]
    lines: list[str]


def read_rows(path: Path, text: str, label: str, quoting: Quoting = "double") -> list[Row]:
    """Read the texts and labels of a file, in the format of its ending.

    Args:
        path: A .csv or .tsv with a header, or a .jsonl.
        text: Name of the column of texts.
        label: Name of the column of labels.
        quoting: "double": a field that begins with a double quote ends with one, as in RFC 4180; "none": quotes of a
            table are text.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has another ending, lacks a column, or has a row that cannot be read; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; data.train, data.val and data.test each name one file")
    ending = path.suffix.lower()
    if ending in DELIMITERS:
        rows = _read_table(path, DELIMITERS[ending], (text, label), quoting)
    elif ending in JSON_LINES:
        if quoting == "none":
            raise ValueError(f"data.quoting=none has no effect on {path}: it is for .csv and .tsv")
        rows = _read_json_lines(path, (text, label))
    else:
        raise ValueError(
            f"{path} ends in {path.suffix or 'nothing'}; readable are {', '.join(ENDINGS[:-1])} and {ENDINGS[-1]}"
        )
    if not rows:
        raise ValueError(f"{path} holds no texts")
    return rows


def normalise_label(label: str | float) -> str:
    """Normalise a label to the name of its class: strip blanks, write 0.0 as 0 and booleans as JSON does.

    Raises:
        ValueError: It is empty, or a word that programs write for a missing label.
    """
    name = json.dumps(label) if isinstance(label, bool) else str(label).strip()
    if not name:
        raise ValueError("is missing or empty")
    if name.lower() in MISSING:
        raise ValueError(f"is {name!r}, which programs write for a missing value; label it, or remove the row")
    return re.sub(r"^(?:-(?=0+\.?0*$))?(-?\d+)\.0+$", r"\1", name)


def check_distinct(labels: Iterable[str], where: str) -> None:
    """Refuse classes that differ only in case, blanks, invisible characters or the form of Unicode.

    Raises:
        ValueError: Two classes do.
    """
    alike = defaultdict(list)
    for label in sorted(set(labels)):
        visible = (c for c in unicodedata.normalize("NFKC", label) if unicodedata.category(c) != "Cf")
        alike[" ".join("".join(visible).casefold().split())].append(label)
    if doubtful := [names for names in alike.values() if len(names) > 1]:
        raise ValueError(
            f"{where}: the classes {' and '.join(map(ascii, doubtful[0]))} differ only in case, blanks or the form of "
            "Unicode; write them in one way, or give them names that differ otherwise"
        )


def _read_table(path: Path, delimiter: str, columns: tuple[str, str], quoting: Quoting) -> list[Row]:
    records = read_records(path, delimiter, quoting)
    header = next(records, None)
    names = [name.strip() for name in header.fields] if header else []
    _check_columns(path, names, columns, delimiter)
    found = []
    for record in records:
        if not "".join(record.fields).strip() and len(record.fields) <= 1:
            continue  # a blank line
        if len(record.fields) != len(names):
            raise ValueError(
                f"{path}, line {record.line}: {len(record.fields)} fields where the header has {len(names)}; a field "
                f"that holds a {_name_delimiter(delimiter)} or a line break must be in double quotes"
                + _suggest_quoting(record, quoting)
            )
        found.append(record)
    text, label = (names.index(column) for column in columns)
    rows = [
        _build_row(
            path, record.line, dict(zip(columns, (record.fields[text], record.fields[label]), strict=True)), columns
        )
        for record in found
    ]
    if quoting == "double":
        _check_swallowed(path, delimiter, found, rows, (len(names), label))
    return rows


def read_records(path: Path, delimiter: str, quoting: Quoting = "double") -> Iterator[Record]:
    """Read the rows of a table, including header and blank lines.

    Raises:
        ValueError: A row cannot be read.
    """
    csv.field_size_limit(sys.maxsize)
    lines = re.findall(r"[^\n]*\n|[^\n]+$", read_text(path))
    strict = partial(csv.reader, lines, delimiter=delimiter, strict=True)
    reader = strict(quoting=csv.QUOTE_NONE) if quoting == "none" else strict()
    while True:
        before = reader.line_num
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(_describe_damage(path, before + 1, str(error), quoting)) from error
        yield Record(before + 1, fields, lines[before : reader.line_num])


def _describe_damage(path: Path, line: int, error: str, quoting: Quoting) -> str:
    if "unexpected end of data" in error:
        said = "a field begins with a double quote that never closes"
    elif "expected after" in error:
        said = "a field continues after the double quote that closes it; inside a field quotes are doubled"
    elif "new-line character" in error:
        return f"{path}, line {line}: a carriage return without a line feed; write line ends as LF or CRLF"
    else:
        said = error
    return f"{path}, line {line}: {said}" + ("; data.quoting=none reads quotes as text" if quoting == "double" else "")


def _suggest_quoting(record: Record, quoting: Quoting) -> str:
    quoted = quoting == "double" and '"' in "".join(record.lines)
    return "; data.quoting=none reads quotes as text" if quoted else ""


def _check_columns(path: Path, names: list[str], columns: tuple[str, str], delimiter: str) -> None:
    if missing := [name for name in columns if name not in names]:
        other = next((c for c in ";\t,|" if len(names) == 1 and c != delimiter and c in names[0]), None)
        apart = (
            f"columns are separated by a {_name_delimiter(delimiter)}, not by a {_name_delimiter(other)}"
            if other
            else ""
        )
        raise ValueError(
            f"{path} has no column {', '.join(missing)}, only {', '.join(names) or 'none at all'}; "
            + (apart or "name yours by data.text and data.label")
        )
    if twice := [name for name in dict.fromkeys(columns) if names.count(name) > 1]:
        raise ValueError(f"{path} has {names.count(twice[0])} columns {twice[0]!r}: give each a name of its own")


def _check_swallowed(
    path: Path, delimiter: str, records: list[Record], rows: list[Row], place: tuple[int, int]
) -> None:
    """Refuse a field of several lines if each line alone is a row with a label of this file.

    A text that begins with a quote by accident swallows the rows up to one that ends with a quote. Labels that occur
    only in such rows count if two of these fields have them.
    """
    width, column = place
    doubtful = []
    for record in records:
        alone = [line.rstrip("\r\n").split(delimiter) for line in record.lines]
        if len(alone) > 1 and all(len(fields) == width for fields in alone):
            doubtful.append((record, alone))
    taken_in = Counter(
        label for _, alone in doubtful for label in {_read_lone_label(fields, column) for fields in alone}
    )
    names = {row.label for row in rows} | {label for label, count in taken_in.items() if label and count > 1}
    for record, alone in doubtful:
        if sum(_read_label(fields[column]) in names for fields in alone) > 1:
            raise ValueError(
                f"{path}, lines {record.line} to {record.line + len(record.lines) - 1}: one field in double quotes, "
                "but each line looks like a row of its own; data.quoting=none reads quotes as text, and in .jsonl "
                "texts of several lines are never in doubt"
            )


def _read_lone_label(fields: list[str], column: int) -> str | None:
    """Read the label of a single line; None if it reads as prose, with a blank after a delimiter."""
    return None if any(field[:1] == " " for field in fields[1:]) else _read_label(fields[column])


def _read_label(field: str) -> str | None:
    try:
        return normalise_label(field)
    except ValueError:
        return None


def _read_json_lines(path: Path, columns: tuple[str, str]) -> list[Row]:
    lines = enumerate(read_text(path).split("\n"), 1)
    return [
        _build_row(path, number, _parse_line(path, number, line), columns) for number, line in lines if line.strip()
    ]


def _parse_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_build_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: not an object with a text and a label")
    return row


def _build_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]:
        raise ValueError(f"the key {twice[0]!r} stands twice in one object")
    return dict(pairs)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number in JSON")


def _build_row(path: Path, line: int, row: dict[str, Any], columns: tuple[str, str]) -> Row:
    where = f"{path}, line {line}"
    text, label = (row.get(name) for name in columns)
    for name, value in zip(columns, (text, label), strict=True):
        if value is None:
            raise ValueError(f"{where}: {name} is missing or empty")
    if not isinstance(text, str):
        raise ValueError(f"{where}: {columns[0]} is {KINDS[type(text)]}, not a string")
    if not text.strip():
        raise ValueError(f"{where}: {columns[0]} is missing or empty")
    if isinstance(label, (list, dict)):
        raise ValueError(f"{where}: {columns[1]} is {KINDS[type(label)]}; a text has one class, a string or a number")
    try:
        name = normalise_label(label)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{where}: {columns[1]} {error}") from error
    try:
        f"{text}{name}".encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half a surrogate pair, {error.object[error.start]!a}, is no character") from error
    return Row(line, text, name)


def _name_delimiter(delimiter: str) -> str:
    return {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}[delimiter]
