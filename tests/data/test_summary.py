"""What data say of what was read, for every kind of data."""

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.glue import save_glue
from tests.data.tokenizer import save_tokenizer
from thresher.data.austen import Austen
from thresher.data.austen_lm import AustenLM
from thresher.data.fashion_mnist_12k import FashionMNIST12k
from thresher.data.glue import Glue
from thresher.data.image_folder import ImageFolder
from thresher.data.listops import ListOps
from thresher.data.summary import PartSummary, build_json
from thresher.data.tab_texts import ReutersR8
from thresher.data.text_corpus import TextCorpus
from thresher.data.text_files import TextFiles


def summary_of(data: Any, *stages: str) -> dict[str, PartSummary]:
    data.prepare_data()
    for stage in stages or ("fit", "test"):
        data.setup(stage)
    parts = data.summary()
    assert [part.name for part in parts] == ["train", "val", "test"]
    return {part.name: part for part in parts}


def labels_of(loader: Any) -> Counter[int]:
    return Counter(torch.cat([labels for _, labels in loader]).tolist())


def test_images_held_out_and_limited() -> None:
    data = FashionMNIST12k(limit_train=100, val_fraction=0.2, seed=3)
    parts = summary_of(data)
    assert [part.examples for part in parts.values()] == [100, 2000, 2000]
    assert parts["train"].left_out == {"by data.limit_train=100": 7900}
    assert parts["val"].source == "held out from train: data.val_fraction=0.2, drawn by data.seed=3"
    assert "ships with the package" in parts["test"].source
    assert parts["test"].classes == dict.fromkeys(data.class_names, 200)
    dataset = data.train_dataloader().dataset
    counts = Counter(data.class_names[i] for i in dataset.source.labels[dataset.indices].tolist())
    assert parts["train"].classes == counts
    assert parts["test"].line() == (
        "test: 2,000 images, 10 classes of 200 each; fashion_mnist_12k.npz, which ships with the package"
    )


def test_a_part_that_is_not_read_says_so() -> None:
    test = summary_of(FashionMNIST12k(), "fit")["test"]
    assert (test.examples, test.line()) == (None, "test: not read")


def test_folders_of_images(write_tree: Callable[..., Path]) -> None:
    root = write_tree({"train/cat": 6, "train/dog": 4, "val/cat": 2, "val/dog": 1, "test/cat": 1, "test/dog": 2})
    parts = summary_of(ImageFolder(root=root))
    assert {name: part.classes for name, part in parts.items()} == {
        "train": {"cat": 6, "dog": 4},
        "val": {"cat": 2, "dog": 1},
        "test": {"cat": 1, "dog": 2},
    }
    assert [part.source for part in parts.values()] == [str(root / name) for name in ("train", "val", "test")]
    assert parts["train"].line() == f"train: 10 images, 2 classes of 4 (dog) to 6 (cat); {root}/train"


@pytest.mark.parametrize("given", ["train", "train, val and test"])
def test_tables_of_texts(tmp_path: Path, given: str) -> None:
    names = ["train"] if given == "train" else ["train", "val", "test"]
    for name, rows in zip(names, (20, 4, 6), strict=False):
        lines = [f"text {i}\t{'good' if i % 4 else 'bad'}" for i in range(rows)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    data = TextFiles(**{name: str(tmp_path / f"{name}.tsv") for name in names}, seed=5)
    parts = summary_of(data)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    for part, loader in zip(parts.values(), loaders, strict=True):
        labels = labels_of(loader)
        assert part.kind == "texts"
        assert part.examples == labels.total()
        assert part.classes == {"bad": labels[0], "good": labels[1]}
    drawn = "held out from train: data.val_fraction=0.1, drawn by data.seed=5"
    assert [part.source for part in parts.values()] == [
        str(tmp_path / f"{name}.tsv") if name in names else drawn for name in ("train", "val", "test")
    ]


def test_lines_that_are_left_out_are_counted(tmp_path: Path) -> None:
    for part in ("train", "test"):
        with (tmp_path / f"reuters-r8-{part}.tab").open("w", newline="") as file:
            rows = [["acq", "a text"], ["earn", "another"], ["acq", " "], ["", "no label"], ["earn"]]
            csv.writer(file, delimiter="\t").writerows([["c", "t"]] * 3 + rows * 5)
    parts = summary_of(ReutersR8(root=str(tmp_path)))
    assert parts["test"].examples == 10
    assert parts["test"].left_out == {"rows without a label or a text": 15}
    assert parts["train"].line().endswith("reuters-r8-train.tab; left out: 15 rows without a label or a text")


def test_pairs_of_texts(tmp_path: Path) -> None:
    save_glue(tmp_path, {"sentence1": "first {}", "sentence2": "second {}"})
    parts = summary_of(Glue(task="rte", root=str(tmp_path)))
    assert {part.kind for part in parts.values()} == {"pairs of texts"}
    assert parts["test"].source == f"the validation split of {tmp_path}, task rte"
    assert all(part.examples == sum((part.classes or {}).values()) for part in parts.values())


def test_texts_that_ship_with_the_package() -> None:
    parts = summary_of(Austen(length=8))
    assert all(len(part.classes or {}) == 6 for part in parts.values())
    assert parts["test"].source.startswith("the last 15% of each novel")


def test_generated_sequences(tmp_path: Path) -> None:
    sizes = {"train": 30, "val": 5, "test": 7}
    data = ListOps(**sizes, min_length=3, max_length=40, max_depth=4, limit_train=20, seed=2, root=str(tmp_path))
    parts = summary_of(data)
    assert [part.examples for part in parts.values()] == [20, 5, 7]
    assert parts["train"].left_out == {"by data.limit_train=20": 10}
    assert "seed=2" in parts["val"].source
    assert sum((parts["test"].classes or {}).values()) == 7


@pytest.mark.parametrize("objective", ["causal", "masked", "denoising"])
def test_the_share_of_a_corpus_that_is_used(tmp_path: Path, objective: Any) -> None:
    for i, characters in enumerate((100, 41, 40, 39, 7)):
        (tmp_path / f"{i}.txt").write_text("x" * characters)
    data = TextCorpus(root=str(tmp_path), context=20, objective=objective)
    parts = summary_of(data)
    windows = data.train_dataloader().dataset.examples
    used = 0
    for i, work in enumerate(windows.works):
        inside = np.zeros(len(work), dtype=bool)
        for start in (start for number, start in windows.starts if number == i):
            inside[start : start + 20 + (objective == "causal")] = True
        used += int(inside.sum())
    assert parts["train"].tokens_read == sum(map(len, windows.works))
    assert parts["train"].tokens_used == used
    assert parts["train"].examples == len(windows)
    assert parts["train"].classes is None
    assert "3 of 5 files" in parts["train"].source
    assert f"of {parts['train'].tokens_read} tokens used" in parts["train"].line()


def test_works_that_ship_with_the_package() -> None:
    parts = summary_of(AustenLM(context=512, limit_train=4))
    assert parts["test"].source == "persuasion, from the texts that ship with the package"
    assert parts["train"].examples == 4
    assert parts["train"].tokens_used == 4 * 512 + 1
    assert parts["test"].tokens_used == parts["test"].tokens_read


def test_shares_are_full_only_where_all_is_used() -> None:
    def said(used: int) -> str:
        return PartSummary("train", "windows", 1, "here", tokens_read=100_000, tokens_used=used).line()

    assert "; 100 % of 100,000 tokens used" in said(100_000)
    assert "; 99.9 % of" in said(99_999)
    assert "; 87.2 % of" in said(87_212)


def test_what_is_written_can_be_read() -> None:
    part = PartSummary("train", "texts", 3, "here", {"a": 1, "b": 2}, Counter({"empty lines": 2}))
    written = json.loads(json.dumps(build_json([part])))["parts"][0]
    assert written.pop("line") == "train: 3 texts, 2 classes of 1 (a) to 2 (b); here; left out: 2 empty lines"
    assert PartSummary(**written) == part


@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_texts_that_are_cut_are_counted_in_their_part(tmp_path: Path, tokenizer: str) -> None:
    rows = [("the cat " * (i % 4 + 1), "ab"[i % 2]) for i in range(40)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *(f"{text},{label}" for text, label in rows)]))
    name = tokenizer if tokenizer == "bytes" else str(save_tokenizer(tmp_path / "tokenizer"))
    length, per_word, special = (16, 4, 0) if tokenizer == "bytes" else (6, 1, 2)
    parts = summary_of(TextFiles(train=str(tmp_path / "a.csv"), tokenizer=name, length=length))
    whole = Counter(dict.fromkeys(range(1, 5), 10))  # texts of 2, 4, 6 and 8 words; up to 4 words are read
    assert sum(part.cut or 0 for part in parts.values()) == whole[3] + whole[4]
    assert sum(part.tokens_read or 0 for part in parts.values()) == sum(
        count * (2 * n * per_word + special) for n, count in whole.items()
    )
    used = sum(count * min(2 * n * per_word + special, length) for n, count in whole.items())
    assert sum(part.tokens_used or 0 for part in parts.values()) == used
    assert f"{parts['train'].cut} of them cut off at their end" in parts["train"].line()


def test_pairs_that_are_cut_are_counted(tmp_path: Path) -> None:
    save_glue(tmp_path / "copy", {"sentence1": "abc", "sentence2": "abcde"})
    for length, cut in ((9, 0), (8, 8)):
        test = summary_of(Glue(task="mrpc", root=str(tmp_path / "copy"), length=length))["test"]
        assert (test.cut, test.tokens_read, test.tokens_used) == (cut, 72, 8 * length)


def test_a_test_file_beside_the_training_file_that_is_not_read_is_told(tmp_path: Path) -> None:
    rows = "\n".join(["text,label", *(f"text {i},{'ab'[i % 2]}" for i in range(40))])
    for name in ("train.csv", "Test.CSV", "dev.jsonl", "test.png", "other.csv"):
        (tmp_path / name).write_text(rows)
    parts = summary_of(TextFiles(train=str(tmp_path / "train.csv")))
    told = {name: list(part.left_out) for name, part in parts.items()}
    assert told == {
        "train": [],
        "val": ["file beside data.train that is named after val: dev.jsonl (data.val is not set)"],
        "test": ["file beside data.train that is named after test: Test.CSV (data.test is not set)"],
    }
    given = summary_of(TextFiles(train=str(tmp_path / "train.csv"), test=str(tmp_path / "Test.CSV")))
    assert not given["test"].left_out
