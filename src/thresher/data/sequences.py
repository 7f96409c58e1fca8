"""Token sequence data: storage, batches of similar lengths, loaders."""

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from thresher.data.loading import (
    EpochBatches,
    TrainingOrder,
    build_evaluation_loader,
    build_training_loader,
    check_loading,
)
from thresher.data.summary import PARTS, PartSummary, count_classes

POOL = 50  # batches among which sequences are sorted by length


class Sequences(Dataset[tuple[Tensor, Tensor]]):
    """Token sequences of different lengths with their labels, stored end to end.

    Args:
        tokens: All ids, one sequence after the other.
        ends: End of each sequence.
        labels: Label of each sequence.
        whole: Number of tokens of each before truncation; None if nothing is truncated.
    """

    def __init__(
        self, tokens: np.ndarray, ends: np.ndarray, labels: np.ndarray, whole: np.ndarray | None = None
    ) -> None:
        self.tokens, self.ends, self.labels, self.whole = tokens, ends, labels, whole

    @classmethod
    def pack(
        cls,
        sequences: Sequence[Sequence[int] | np.ndarray],
        labels: Sequence[int] | np.ndarray,
        whole: Sequence[int] | np.ndarray | None = None,
    ) -> "Sequences":
        """Store sequences end to end."""
        flat = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in sequences] or [np.zeros(0, dtype=np.int32)])
        ends = np.cumsum([len(ids) for ids in sequences], dtype=np.int64)
        return cls(flat, ends, np.asarray(labels), None if whole is None else np.asarray(whole, dtype=np.int64))

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
        """Select sequences, in the given order."""
        starts = self.ends - self.lengths
        whole = None if self.whole is None else self.whole[list(indices)]
        return Sequences.pack(
            [self.tokens[starts[i] : self.ends[i]] for i in indices], self.labels[list(indices)], whole
        )


class LengthBatches(EpochBatches):
    """Batches of sequences of similar lengths, in a random order, to save padding.

    The sampler selects and orders the sequences. They are sorted by length in pools of 50 batches, and the batches are
    shuffled by a seed from that order. The arguments are those of `BatchSampler`, so that Lightning can use a
    distributed sampler.
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
        if len(batches) > len(self):  # one example more than other processes have
            batches[-2:] = [batches[-2] + batches[-1]]
        if order:
            random.Random(order[0] + len(order) * order[-1]).shuffle(batches)
        yield from batches


class SequenceData(TrainingOrder, pl.LightningDataModule, ABC):
    """Labelled token sequences for training, validation and test.

    Batches are token ids [b, n], padded with `padding`, and labels [b]. The order of training depends on `seed`
    alone unless `set_order_seed` is called.

    Args:
        batch_size: Sequences in a batch of one process.
        workers: Processes that load data; 0 loads them in the training process.
        seed: Of the split, and of the training order unless `set_order_seed` is called.
        limit_train: Number of training sequences to use, from the first; None for all.

    Attributes:
        padding: The id of padding.
        kind: The noun for examples, in the plural.
        sources: The origin of each part, in words; set by `read`.
        left_out: Numbers of unused items by reason, for each part; set by `read`.

    Raises:
        ValueError: A number is out of range.
    """

    padding = 0
    kind = "sequences"

    def __init__(self, *, batch_size: int, workers: int, seed: int, limit_train: int | None) -> None:
        super().__init__()
        check_loading(batch_size, workers, seed, limit_train)
        self.batch_size, self.workers, self.seed, self.limit_train = batch_size, workers, seed, limit_train
        self._order_seed = seed
        self.sources: dict[str, str] = {}
        self.left_out: dict[str, Counter[str]] = {}
        self._parts: dict[str, Sequences] = {}

    @abstractmethod
    def read(self) -> dict[str, Sequences]:
        """Read the parts `train`, `val` and `test`."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the labels."""

    @property
    @abstractmethod
    def model_arguments(self) -> Mapping[str, Any]:
        """Arguments of a model that depend on the data."""

    @abstractmethod
    def symbols(self, ids: Sequence[int]) -> list[str]:
        """Name the token of each id."""

    @property
    def task_arguments(self) -> Mapping[str, Any]:
        """Arguments of a task that depend on the data."""
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
            self.left_out.setdefault("train", Counter())[f"by data.limit_train={stop}"] = len(train) - stop
            parts["train"] = train.select(range(stop))
        self._parts = parts

    def summary(self) -> list[PartSummary]:
        """Summarise each part."""
        return [self._summarise_part(name) for name in PARTS]

    def _summarise_part(self, name: str) -> PartSummary:
        part = self._parts.get(name)
        left_out: Mapping[str, int] = self.left_out.get(name, {})
        if part is None:
            return PartSummary(name, self.kind, None, "not read", left_out=left_out)
        source = self.sources.get(name, type(self).__name__)
        counts = count_classes(self.class_names, part.labels.tolist())
        if part.whole is None:
            return PartSummary(name, self.kind, len(part), source, counts, left_out)
        read, used = int(part.whole.sum()), int(part.lengths.sum())
        cut = int((part.whole > part.lengths).sum())
        return PartSummary(name, self.kind, len(part), source, counts, left_out, cut, read, used)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Load shuffled batches of one size; drop a smaller last batch unless it is the only one."""
        return build_training_loader(self.get_part("train"), self.trainer, seed=self.order_seed, **self._options)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Load all validation sequences, in a fixed order."""
        return build_evaluation_loader(self.get_part("val"), self.trainer, **self._options)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Load all test sequences, in a fixed order."""
        return build_evaluation_loader(self.get_part("test"), self.trainer, **self._options)

    def get_part(self, name: str) -> Sequences:
        """Return the examples of a part: "train", "val" or "test".

        Raises:
            ValueError: Nothing is read yet.
        """
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
        """Join sequences to a batch, padded at the end."""
        tokens, labels = zip(*examples, strict=True)
        return pad_sequence(list(tokens), batch_first=True, padding_value=self.padding), torch.stack(labels)
