"""Labelled texts from the user's files: CSV, TSV or JSON lines with a text and a label column."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch

from thresher.attention.options import check_choice
from thresher.data.part_names import find_part
from thresher.data.summary import describe_held_out
from thresher.data.tables import ENDINGS, Quoting, check_distinct, read_rows
from thresher.data.text import TextClassificationData, Texts


class TextFiles(TextClassificationData):
    """Texts from one file for each part. Classes are the labels of the training texts, in alphabetical order.

    Blanks around labels are stripped, and 1.0 is read as 1. A row that cannot be read in full is refused with its file
    and line.

    Args:
        train: File of the training texts: .csv or .tsv with a header, or .jsonl.
        test: File of the test texts; None holds out a share `val_fraction` of the training texts.
        val: File of the validation texts; None holds out a share `val_fraction` of the training texts.
        text: Name of the column of texts.
        label: Name of the column of labels.
        quoting: "double": fields of a table may stand in double quotes, as in RFC 4180; "none": quotes are text.
        batch_size: See `TextClassificationData`, as for the others.
        workers: Processes that load data.
        seed: Of the split and the order.
        val_fraction: Share of the training texts held out for validation.
        limit_train: Number of training texts to use, from the first.
        length: Largest number of tokens of a text.
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
        quoting: Quoting = "double",
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
        check_choice("data.quoting", quoting, get_args(Quoting))
        if text == label:
            raise ValueError(f"data.text and data.label both name the column {text!r}")
        self.files = {"train": train, "val": val, "test": test}
        self.columns, self.quoting = (text, label), quoting

    def read_texts(self) -> tuple[list[str], dict[str, Texts]]:
        """Read the files."""
        files = {part: Path(path).expanduser() for part, path in self.files.items() if path is not None}
        rows = {part: read_rows(path, *self.columns, self.quoting) for part, path in files.items()}
        check_distinct((row.label for some in rows.values() for row in some), ", ".join(map(str, files.values())))
        self._count_unread(files)
        names = sorted({row.label for row in rows["train"]})
        self.sources |= {part: str(path) for part, path in files.items()}
        number = {name: i for i, name in enumerate(names)}
        parts = {}
        for part, some in rows.items():
            if unknown := sorted({row.label for row in some} - number.keys()):
                first = next(row for row in some if row.label not in number)
                raise ValueError(
                    f"{self.files[part]} has labels that training does not: {', '.join(unknown[:10])}; the first, "
                    f"{first.label}, is in line {first.line}"
                )
            lines = [row.line for row in some]
            parts[part] = Texts(
                [row.text for row in some], [number[row.label] for row in some], None, (files[part], lines)
            )
        if "test" not in parts:
            parts["train"], parts["test"] = self._hold_out(parts["train"])
            self.sources["test"] = describe_held_out(self.val_fraction, self.seed)
        return names, parts

    def _count_unread(self, files: Mapping[str, Path]) -> None:
        """Count unused files beside the training file that are named after a held-out part."""
        for path in sorted(files["train"].parent.iterdir()):
            part = find_part(path.stem)
            if part and part not in files and path.suffix.lower() in ENDINGS and path.is_file():
                reason = f"file beside data.train that is named after {part}: {path.name} (data.{part} is not set)"
                self.left_out.setdefault(part, Counter())[reason] = 1

    def _hold_out(self, train: Texts) -> tuple[Texts, Texts]:
        order = torch.randperm(len(train.texts), generator=torch.Generator().manual_seed(self.seed + 1)).tolist()
        cut = round(self.val_fraction * len(order))
        return train.take(order[cut:]), train.take(order[:cut])
