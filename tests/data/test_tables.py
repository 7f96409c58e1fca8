"""Tables and JSON lines of texts: read in full, or refused with file and line."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from thresher.data.tables import Quoting, read_rows
from thresher.data.text_files import TextFiles


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(path: Path, quoting: Quoting = "double") -> list[tuple[str, str]]:
    return [(row.text, row.label) for row in read_rows(path, "text", "label", quoting)]


def json_lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


HARD = [
    'say "hi"',
    "a, b",
    "two\nlines",
    "tab\there",
    " blanks ",
    "\r\nx",
    "é",
    "'",
    'ends in "',
    '"',
    "a\u2028b",
    "\x1cx",
]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".CSV", ".jsonl", ".JSONL"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_what_others_write_comes_back_with_its_lines(tmp_path: Path, ending: str, quoting: Any) -> None:
    path = tmp_path / f"a{ending}"
    wanted = [(text, f"c{i % 2}") for i, text in enumerate(HARD)]
    if "json" in ending.lower():
        written(tmp_path, path.name, json_lines(*({"text": text, "label": label} for text, label in wanted)))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, delimiter="," if ending.lower() == ".csv" else "\t", quoting=quoting)
            table.writerows([("text", "label"), *wanted])
    assert rows(path) == wanted
    if ending == ".csv":
        lines = [row.line for row in read_rows(path, "text", "label")]
        assert lines[:5] == [2, 3, 4, 6, 7]  # the third text is in two lines


@pytest.mark.parametrize(
    "content", ["text,label\r\na,x\r\n\r\nb,y\r\n", "\ufefftext , label\na,x\n\n  \nb,y\n\n", "text,label\na,x\nb,y"]
)
def test_line_ends_blank_lines_and_marks_of_order_are_no_text(tmp_path: Path, content: str) -> None:
    assert rows(written(tmp_path, "a.csv", content)) == [("a", "x"), ("b", "y")]


DAMAGE = {
    "never closed": (
        "a.tsv",
        'label\ttext\npos\tgood\nneg\t"it begins\npos\tthird\n',
        "line 3: a field begins with a double quote that never",
    ),
    "goes on": (
        "a.csv",
        'text,label\na,x\n"it" begins,y\n',
        "line 3: a field continues after the double quote that closes",
    ),
    "backslash": ("a.csv", 'text,label\n"a \\"b\\" c",x\n', "line 2: a field continues after"),
    "swallowed": (
        "a.tsv",
        'label\ttext\npos\ta\nneg\t"it begins\npos\tb\nneg\tand ends"\npos\tc\n',
        r"lines 3 to 5: one field in double quotes, but each line looks like a row",
    ),
    "swallowed, text first": (
        "a.csv",
        'text,label\na,pos\n"it begins,neg\nb,pos\nand ends",neg\n',
        "lines 3 to 5: one field",
    ),
    "comma": (
        "a.csv",
        "text,label\ngood,pos\nbad, really bad,neg\n",
        "line 3: 3 fields where the header has 2; a field that holds a comma",
    ),
    "short": ("a.csv", "id,text,label\n1,a,x\n2,b\n", "line 3: 2 fields where the header has 3"),
    "two lines": ("a.csv", 'text,label\n"a\nb",x\nc\n', "line 4: 1 fields"),
    "tabs": ("a.tsv", "text\tlabel\na\tb\tx\n", "line 2: 3 fields where the header has 2; a field that holds a tab"),
    "carriage return": ("a.csv", "text,label\na,x\nb\rc,y\n", "line 3: a carriage return without a line feed"),
    "old line ends": ("a.csv", "text,label\ra,x\rb,y\r", "line 1: a carriage return without a line feed"),
    "nul": ("a.csv", b"text,label\na,x\nb\0,y\n", "line 3: a NUL byte"),
    "nul in json": ("a.jsonl", b'{"text": "a", "label": "x"}\n\0', "line 2: a NUL byte"),
    "latin": ("a.csv", "text,label\na,x\né,y\n".encode("latin1"), "is not UTF-8 text: line 3 has byte 0xe9"),
    "utf-16": ("a.csv", "text,label\na,x\n".encode("utf-16"), "is not UTF-8 text but UTF-16"),
    "utf-32": ("a.jsonl", "[]".encode("utf-32"), "is not UTF-8 text but UTF-32"),
    "two columns of one name": ("a.csv", "text,label,label\na,x,y\n", "has 2 columns 'label'"),
    "two columns but for blanks": ("a.csv", "text, text,label\na,b,y\n", "has 2 columns 'text'"),
    "semicolons": ("a.csv", "text;label\na;x\n", "separated by a comma, not by a semicolon"),
    "no label": ("a.csv", "text,label\na,x\nb,  \n", "line 3: label is missing or empty"),
    "no text": ("a.csv", "text,label\na,x\n ,y\n", "line 3: text is missing or empty"),
    "nan": ("a.csv", "text,label\na,x\nb,nan\n", "line 3: label is 'nan', which programs write for a missing"),
    "inf": ("a.csv", "text,label\na,x\nb,-inf\n", "line 3: label is '-inf', which programs write for a missing"),
    "over inf": ("a.jsonl", '{"text": "a", "label": 1e999}', "line 1: label is 'inf', which programs write"),
    "NaN": ("a.jsonl", '{"text": "a", "label": NaN}', "line 1: NaN is not a number"),
    "null": ("a.jsonl", json_lines({"text": "a", "label": None}), "line 1: label is missing"),
    "no key": ("a.jsonl", json_lines({"text": "a"}), "line 1: label is missing"),
    "list": (
        "a.jsonl",
        json_lines({"text": "a", "label": "x"}, {"text": "b", "label": ["x"]}),
        "line 2: label is a list",
    ),
    "object": ("a.jsonl", json_lines({"text": {"en": "b"}, "label": "x"}), "line 1: text is an object, not a string"),
    "number": ("a.jsonl", json_lines({"text": 5, "label": "x"}), "line 1: text is a number, not a string"),
    "list of texts": ("a.jsonl", json_lines({"text": ["b"], "label": "x"}), "line 1: text is a list, not a string"),
    "key twice": ("a.jsonl", '{"text": "a", "label": "x", "label": "y"}', "line 1: the key 'label' stands twice"),
    "surrogate": ("a.jsonl", '{"text": "a \\ud800", "label": "x"}', "line 1: half a surrogate pair"),
    "deep": ("a.jsonl", "[" * 100_000, "line 1: "),
    "digits": ("a.jsonl", '{"text": "a", "label": ' + "9" * 5000 + "}", "line 1: "),
}


@pytest.mark.parametrize(("name", "content", "said"), DAMAGE.values(), ids=DAMAGE.keys())
def test_what_cannot_be_read_in_full_is_refused_with_file_and_line(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        rows(written(tmp_path, name, content))
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("case", ["never closed", "goes on", "swallowed", "swallowed, text first"])
def test_quotes_can_be_text(tmp_path: Path, case: str) -> None:
    name, content, _ = DAMAGE[case]
    path = written(tmp_path, name, content)
    with pytest.raises(ValueError, match=r"data\.quoting=none reads quotes as text"):
        rows(path)
    assert isinstance(content, str)
    lines = [tuple(line.split("," if name.endswith("csv") else "\t")) for line in content.splitlines()[1:]]
    wanted = lines if content.startswith("text") else [(text, label) for label, text in lines]
    assert rows(path, "none") == wanted


def test_texts_of_several_lines_are_no_rows_that_a_quote_took_in(tmp_path: Path) -> None:
    content = 'label,text\npos,"Hello\nbye, then"\nneg,"one, two\nthree, four"\n'
    assert rows(written(tmp_path, "a.csv", content))[:2] == [
        ("Hello\nbye, then", "pos"),
        ("one, two\nthree, four", "neg"),
    ]


@pytest.mark.parametrize(
    "labels", ["000", "abb", "abc", "010", ["0.0", "1.0", "0.0"], ["a", "b", "c"], ["a ", "b ", "c"]]
)
@pytest.mark.parametrize("first", ["text", "label"])
def test_rows_that_quotes_take_in_are_seen_whatever_their_labels(tmp_path: Path, labels: Any, first: str) -> None:
    lines = []
    for i in range(5):
        texts = (f'"quoted {i} said', f'nice {i}"', f"plain {i}")
        lines += [f"{text},{label}" for text, label in zip(texts, labels, strict=True)]
    header = "text,label"
    if first == "label":  # the quote begins a field in the middle, and ends one
        lines = [",".join(reversed(line.split(","))) for line in lines]
        header = "label,text"
    path = written(tmp_path, "a.csv", "\n".join([header, *lines]) + "\n")
    with pytest.raises(ValueError, match="lines 2 to 3: one field in double quotes, but each line looks like a row"):
        rows(path)
    assert len(rows(path, "none")) == 15


@pytest.mark.parametrize("greeting", ["Hello, all", "Dear Sir,", "Dear all"])
def test_texts_that_begin_alike_are_no_rows_that_a_quote_took_in(tmp_path: Path, greeting: str) -> None:
    content = "".join(f'"{greeting}\nthis is {i}",{"ab"[i % 2]}\n' for i in range(4))
    assert len(rows(written(tmp_path, "a.csv", "text,label\n" + content))) == 4


def test_quoting_says_nothing_of_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.quoting=none has no effect on .*a\.jsonl"):
        rows(written(tmp_path, "a.jsonl", "{}"), "none")
    with pytest.raises(ValueError, match=r"data\.quoting must be one of double, none"):
        TextFiles(train="a.csv", quoting="single")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data\.text and data\.label both name the column 'x'"):
        TextFiles(train="a.csv", text="x", label="x")


SAME = [
    ["pos", " pos", "pos ", "\tpos"],
    [0, 0.0, "0", "0.0", -0.0, "00.0"[1:]],
    [True, "true"],
    [3, 3.0, "3.00"],
    ["1.5", 1.5],
    ["-2", -2.0],
]


@pytest.mark.parametrize("labels", SAME, ids=lambda labels: str(labels[0]))
def test_labels_that_mean_one_class_are_one(tmp_path: Path, labels: list[Any]) -> None:
    path = written(tmp_path, "a.jsonl", json_lines(*({"text": "a", "label": label} for label in labels)))
    assert {label for _, label in rows(path)} == {
        str(json.loads(json.dumps(labels[0]))) if labels[0] is not True else "true"
    }


def test_labels_that_differ_in_more_than_form_stay_apart(tmp_path: Path) -> None:
    labels = ["1", "10", "1.5", "1.50", "01", "a.0", "none", "null", "v1.0", "-", "0x0"]
    path = written(tmp_path, "a.jsonl", json_lines(*({"text": "a", "label": label} for label in labels)))
    assert [label for _, label in rows(path)] == labels


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("pos", "Pos"),
        ("é", "e\u0301"),
        ("straße", "STRASSE"),
        ("a b", "a  b"),
        ("a b", "a\xa0b"),
        ("a", "a\u200b"),
        (True, "True"),
    ],
)
@pytest.mark.parametrize("where", ["train", "test"])
def test_classes_that_look_alike_are_refused_by_name(tmp_path: Path, one: Any, other: Any, where: str) -> None:
    texts = [{"text": f"text {i}", "label": "xy"[i % 2]} for i in range(30)]
    parts = {"train": [*texts, {"text": "a", "label": one}], "test": texts[:4]}
    parts[where] = [*parts[where], {"text": "b", "label": other}]
    files = {part: str(written(tmp_path, f"{part}.jsonl", json_lines(*some))) for part, some in parts.items()}
    with pytest.raises(ValueError, match="differ only in case, blanks or the form of Unicode") as caught:
        TextFiles(**files).read_texts()
    assert ascii(other) in str(caught.value)
