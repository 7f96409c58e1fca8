"""Text classification data: tokens, split, class names and counts."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from thresher.attention.options import check_integer, check_number
from thresher.data.sequences import SequenceData, Sequences
from thresher.data.summary import describe_held_out
from thresher.data.tokens import load_tokenizer

UNLIMITED = 2**31 - 1  # tokens, more than any text has


class Texts(NamedTuple):
    """Texts, or pairs of texts, with their labels.

    Attributes:
        texts: One string for each example.
        labels: The class of each example, as an index into the class names.
        second: The second string of each example, if they are pairs.
        lines: Their file, and the line where each begins.
    """

    texts: list[str]
    labels: list[int]
    second: list[str] | None = None
    lines: tuple[Path, list[int]] | None = None

    def take(self, indices: Sequence[int]) -> "Texts":
        """Select some of the texts."""
        texts, labels = [self.texts[i] for i in indices], [self.labels[i] for i in indices]
        second = None if self.second is None else [self.second[i] for i in indices]
        lines = None if self.lines is None else (self.lines[0], [self.lines[1][i] for i in indices])
        return Texts(texts, labels, second, lines)


class TextClassificationData(SequenceData):
    """Labelled texts; a subclass reads its files in `read_texts`.

    Args:
        batch_size: Texts in a batch of one process.
        workers: Processes that load data; 0 loads them in the training process.
        seed: Of the split, and of the training order unless `set_order_seed` is called.
        val_fraction: Share of the training texts held out for validation, where there is no validation set.
        limit_train: Number of training texts to use after the split, from the first; None for all.
        length: Largest number of tokens of a text; longer ones are truncated.
        tokenizer: `bytes`, the folder of a tokenizer of Hugging Face's, or its name on the hub.

    Raises:
        ValueError: A hyper-parameter outside its range.
    """

    def __init__(
        self,
        *,
        batch_size: int = 32,
        workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        limit_train: int | None = None,
        length: int = 512,
        tokenizer: str = "bytes",
    ) -> None:
        super().__init__(batch_size=batch_size, workers=workers, seed=seed, limit_train=limit_train)
        check_number("data.val_fraction", val_fraction, above=0.0, below=1.0)
        check_integer("data.length", length, 1)
        self.val_fraction, self.length = val_fraction, length
        self.tokenizer = load_tokenizer(tokenizer)
        self.padding = self.tokenizer.padding
        self._classes: list[str] = []
        self._separator: int | None = None

    @abstractmethod
    def read_texts(self) -> tuple[list[str], dict[str, Texts]]:
        """Read the class names and the parts `train` and `test`, and `val` if there is one.

        Raises:
            FileNotFoundError: The files are missing; the message says how to get them.
        """

    def read(self) -> dict[str, Sequences]:
        """Encode the texts, shuffle each part, and hold out some for validation.

        Files are often sorted by class; without shuffling, the first test batches would hold few classes.
        """
        self._classes, parts = self.read_texts()
        if len(self._classes) < 2:
            found = f"of one class only: {self._classes[0]}" if self._classes else "of no class at all"
            raise ValueError(f"{type(self).__name__} has texts {found}")
        self.kind = "texts" if all(part.second is None for part in parts.values()) else "pairs of texts"
        sequences = {name: self._shuffle(self._encode(name, part)) for name, part in parts.items()}
        if "val" not in sequences:
            train = sequences["train"]
            count = round(self.val_fraction * len(train))
            sequences["val"] = train.select(range(count))
            sequences["train"] = train.select(range(count, len(train)))
            self.sources["val"] = describe_held_out(self.val_fraction, self.seed)
        return sequences

    def _shuffle(self, part: Sequences) -> Sequences:
        return part.select(torch.randperm(len(part), generator=torch.Generator().manual_seed(self.seed)).tolist())

    def _encode(self, name: str, part: Texts) -> Sequences:
        if part.second is None:
            ids, lengths = self.tokenizer.encode_counted(part.texts, limit=self.length)
        else:
            ids, self._separator = self.tokenizer.encode_pairs(part.texts, part.second, limit=self.length)
            lengths = self._count_uncut(part.texts, part.second, ids)
        if blank := [i for i, each in enumerate(ids) if not each]:
            first = f"the first of them is number {blank[0]}"
            if part.lines is not None:
                file, lines = part.lines
                first = f"one of them is in {file}, line {min(lines[i] for i in blank)}"
            raise ValueError(f"{len(blank)} of the {name} texts of {type(self).__name__} are empty; {first}")
        return Sequences.pack(ids, part.labels, lengths)

    def _count_uncut(self, first: Sequence[str], second: Sequence[str], ids: list[list[int]]) -> list[int]:
        """Count the tokens of pairs before truncation."""
        lengths = [len(each) for each in ids]
        full = [i for i, length in enumerate(lengths) if length >= self.length]
        uncut = self.tokenizer.encode_pairs([first[i] for i in full], [second[i] for i in full], limit=UNLIMITED).ids
        for i, each in zip(full, uncut, strict=True):
            lengths[i] = len(each)
        return lengths

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the labels; known after `setup`."""
        if not self._classes:
            raise ValueError(f"the classes of {type(self).__name__} are known after prepare_data() and setup('fit')")
        return list(self._classes)

    def symbols(self, ids: Sequence[int]) -> list[str]:
        return self.tokenizer.pieces(ids)

    @property
    def model_arguments(self) -> Mapping[str, Any]:
        """Arguments of a model that depend on the data; for pairs of texts also the separator."""
        arguments = {
            "num_classes": len(self.class_names),
            "vocabulary": self.tokenizer.vocabulary,
            "length": self.length,
            "padding": self.padding,
        }
        return arguments if self._separator is None else arguments | {"separator": self._separator}

    @property
    def task_arguments(self) -> Mapping[str, Any]:
        """Arguments of a task that depend on the data, with the number of training texts of each class."""
        counts = Counter(self.get_part("train").labels.tolist())
        return {
            "num_classes": len(self.class_names),
            "class_counts": [counts[i] for i in range(len(self.class_names))],
        }
