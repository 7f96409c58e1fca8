"""What all data made of token sequences share: storage, batches of like lengths, loaders."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from thresher.data.loading import EpochBatches, check_loading, evaluation_loader, training_loader

POOL = 50  # batches among which sequences are sorted by length


class Sequences(Dataset[tuple[Tensor, Tensor]]):
    """Token sequences of different lengths with their labels, stored end to end.

    Args:
        tokens: All ids, one sequence after the other.
        ends: Where each sequence ends.
        labels: One for each sequence.
    """

    def __init__(self, tokens: np.ndarray, ends: np.ndarray, labels: np.ndarray) -> None:
        self.tokens, self.ends, self.labels = tokens, ends, labels

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int] | np.ndarray], labels: Sequence[int] | np.ndarray) -> "Sequences":
        """Store sequences end to end."""
        flat = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in sequences] or [np.zeros(0, dtype=np.int32)])
        return cls(flat, np.cumsum([len(ids) for ids in sequences]), np.asarray(labels))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = int(self.ends[index - 1]) if index else 0
        tokens = self.tokens[start : int(self.ends[index])].astype(np.int64)
        return torch.from_numpy(tokens), torch.tensor(int(self.labels[index]))

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each sequence."""
        return np.diff(self.ends, prepend=0)

    def select(self, indices: Sequence[int]) -> "Sequences":
        """Return some of the sequences, in the order given."""
        starts = self.ends - self.lengths
        return Sequences.of([self.tokens[starts[i] : self.ends[i]] for i in indices], self.labels[list(indices)])


class LengthBatches(EpochBatches):
    """Batches of sequences of like lengths, in a random order: little padding, and little order to learn from.

    The sampler says which sequences are taken and in which order. They are sorted by length in pools of 50 batches, and
    the batches shuffled by a seed drawn from that order. Its arguments are those of `BatchSampler`, so that Lightning
    can put a distributed sampler in.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool) -> None:
        super().__init__(sampler, batch_size, drop_last)
        data: Any = getattr(sampler, "data_source", None) or sampler.dataset  # type: ignore[attr-defined]
        self._lengths = data.lengths

    def batches(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        if self.drop_last:
            order = order[: len(order) // self.batch_size * self.batch_size]
        pool = POOL * self.batch_size
        batches = []
        for start in range(0, len(order), pool):
            alike = sorted(order[start : start + pool], key=lambda i: int(self._lengths[i]))
            batches += [alike[i : i + self.batch_size] for i in range(0, len(alike), self.batch_size)]
        if len(batches) > len(self):  # for one example that other processes lack
            batches[-2:] = [batches[-2] + batches[-1]]
        if order:
            random.Random(order[0] + len(order) * order[-1]).shuffle(batches)
        yield from batches


class SequenceData(pl.LightningDataModule, ABC):
    """Labelled token sequences for training, validation and test.

    Batches are token ids [b, n], filled up with `padding`, and labels [b]. The order of training depends on `seed`
    alone unless `order_seed` is set.

    Args:
        batch_size: Sequences in a batch of one process.
        workers: Processes that load data; 0 loads them in the training process.
        seed: Of the split, and of the training order unless `order_seed` is set.
        limit_train: Train on the first so many of the training sequences; None for all.

    Attributes:
        padding: The id that fills up sequences.

    Raises:
        ValueError: A number is out of range.
    """

    padding = 0

    def __init__(self, *, batch_size: int, workers: int, seed: int, limit_train: int | None) -> None:
        super().__init__()
        check_loading(batch_size, workers, seed, limit_train)
        self.batch_size, self.workers, self.seed, self.limit_train = batch_size, workers, seed, limit_train
        self.order_seed = seed
        self._parts: dict[str, Sequences] = {}

    @abstractmethod
    def read(self) -> dict[str, Sequences]:
        """Return the parts `train`, `val` and `test`."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the labels."""

    @property
    @abstractmethod
    def model_arguments(self) -> Mapping[str, Any]:
        """What a model must know of the data."""

    @abstractmethod
    def symbols(self, ids: Sequence[int]) -> list[str]:
        """Return what each token id stands for."""

    @property
    def task_arguments(self) -> Mapping[str, Any]:
        """What a task must know of the data."""
        return {"num_classes": len(self.class_names)}

    def setup(self, stage: str) -> None:
        """Read the sequences."""
        if self._parts:
            return
        parts = self.read()
        if empty := [name for name, part in parts.items() if not len(part)]:
            raise ValueError(f"{type(self).__name__} has no sequences for {', '.join(empty)}")
        if self.limit_train is not None:
            train = parts["train"]
            if self.limit_train > len(train):
                raise ValueError(f"data.limit_train={self.limit_train} but there are {len(train)} training sequences")
            stop = self.limit_train
            parts["train"] = Sequences(
                train.tokens[: int(train.ends[stop - 1])], train.ends[:stop], train.labels[:stop]
            )
        self._parts = parts

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return shuffled batches of one size; a last smaller one is dropped unless it is the only one."""
        return training_loader(self._part("train"), self.trainer, seed=self.order_seed, **self._options)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return all validation sequences, in one order."""
        return evaluation_loader(self._part("val"), self.trainer, **self._options)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return all test sequences, in one order."""
        return evaluation_loader(self._part("test"), self.trainer, **self._options)

    def _part(self, name: str) -> Sequences:
        if not self._parts:
            raise ValueError(f"{type(self).__name__} has read nothing yet; call prepare_data() and setup('fit')")
        return self._parts[name]

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "batches": LengthBatches,
            "num_workers": self.workers,
            "persistent_workers": self.workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": self.collate,
        }

    def collate(self, examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Put sequences into one batch, filled up with padding at the end."""
        tokens, labels = zip(*examples, strict=True)
        return pad_sequence(list(tokens), batch_first=True, padding_value=self.padding), torch.stack(labels)
