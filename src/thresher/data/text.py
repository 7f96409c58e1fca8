"""What all text classification data share: tokens, split, class names and counts."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from thresher.attention.options import check_integer, check_number
from thresher.data.sequences import SequenceData, Sequences
from thresher.data.tokens import load_tokenizer


class Texts(NamedTuple):
    """Texts, or pairs of texts, with their labels.

    Attributes:
        texts: One string for each example.
        labels: The place of its class among the names of the classes.
        second: The other string of each example, where they are pairs.
    """

    texts: list[str]
    labels: list[int]
    second: list[str] | None = None


class TextClassificationData(SequenceData):
    """Labelled texts; a data set derives from this class and reads its files in `read_texts`.

    Args:
        batch_size: Texts in a batch of one process.
        workers: Processes that load data; 0 loads them in the training process.
        seed: Of the split, and of the training order unless `order_seed` is set.
        val_fraction: Share of the training texts held out for validation, where there is no validation set.
        limit_train: Train on the first so many of the training texts left after the split; None for all.
        length: Tokens of a text that are read; the rest is cut off.
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
        """Return the names of the classes and the parts `train` and `test`, and `val` if there is one.

        Raises:
            FileNotFoundError: The files are not there; the message says how to get them.
        """

    def read(self) -> dict[str, Sequences]:
        """Turn texts into tokens, put each part into random order, and hold some out for validation.

        Files are often sorted by class; a test on the first batches would then see a few classes only.
        """
        self._classes, parts = self.read_texts()
        if len(self._classes) < 2:
            found = f"of one class only: {self._classes[0]}" if self._classes else "of no class at all"
            raise ValueError(f"{type(self).__name__} has texts {found}")
        sequences = {name: self._shuffled(self._encode(name, part)) for name, part in parts.items()}
        if "val" not in sequences:
            train = sequences["train"]
            held_out = round(self.val_fraction * len(train))
            sequences["val"] = train.select(range(held_out))
            sequences["train"] = train.select(range(held_out, len(train)))
        return sequences

    def _shuffled(self, part: Sequences) -> Sequences:
        return part.select(torch.randperm(len(part), generator=torch.Generator().manual_seed(self.seed)).tolist())

    def _encode(self, name: str, part: Texts) -> Sequences:
        if part.second is None:
            ids = self.tokenizer.encode(part.texts, whole=True, limit=self.length)
        else:
            ids, self._separator = self.tokenizer.encode_pairs(part.texts, part.second, limit=self.length)
        if blank := sum(not each for each in ids):
            raise ValueError(f"{blank} of the {name} texts of {type(self).__name__} are empty")
        return Sequences.of(ids, part.labels)

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
        """What a model must know of the data; of pairs of texts, also what separates them."""
        arguments = {
            "num_classes": len(self.class_names),
            "vocabulary": self.tokenizer.vocabulary,
            "length": self.length,
            "padding": self.padding,
        }
        return arguments if self._separator is None else arguments | {"separator": self._separator}

    @property
    def task_arguments(self) -> Mapping[str, Any]:
        """What a task must know of the data: how often each class occurs in training, too."""
        counts = Counter(self._part("train").labels.tolist())
        return {
            "num_classes": len(self.class_names),
            "class_counts": [counts[i] for i in range(len(self.class_names))],
        }
