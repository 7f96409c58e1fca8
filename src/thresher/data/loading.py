"""The order of training as a function of seed and epoch, so that a run that goes on meets the batches that were due.

Random changes of examples are a function of the seed, the epoch and the examples of their batch, in whatever process
they are made: they depend neither on the number of workers nor on what was drawn before. With several processes each
takes every world-th example of one order: together their batches are the batch that a single process would have. In
an evaluation each example is in one process alone, and all have as many batches, since each batch may wait for others.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler, SequentialSampler

from thresher.attention.options import check_integer

LARGEST_SEED = 2**63 - 1  # of PyTorch


class EpochSampler(DistributedSampler[Any]):
    """The share of a process in all examples, in an order that depends on `seed` and the epoch alone.

    Args:
        examples: The examples.
        seed: Of the order.
        rank: Of this process.
        world: Number of processes; each gets as many examples as the others, and what is left over waits an epoch.
    """

    def __init__(self, examples: Any, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(examples, num_replicas=world, rank=rank, seed=seed, drop_last=True)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(key_of(self.seed, self.epoch))
        order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
        yield from order[self.rank : len(self) * self.num_replicas : self.num_replicas].tolist()
        self.epoch += 1  # where nobody calls set_epoch


class ShareSampler(DistributedSampler[Any]):
    """The share of a process in all examples, in their order: none is left out, and none is seen twice.

    Its length is what all processes have; the first of them may have one example more.

    Args:
        examples: The examples.
        rank: Of this process.
        world: Number of processes.

    Raises:
        ValueError: There are fewer examples than processes.
    """

    def __init__(self, examples: Any, rank: int, world: int) -> None:
        if len(examples) < world:
            raise ValueError(f"{len(examples)} examples to evaluate are too few for {world} processes: use fewer")
        super().__init__(examples, num_replicas=world, rank=rank, shuffle=False)

    def __len__(self) -> int:
        return len(self.dataset) // self.num_replicas  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


class Batch(list[int]):
    """The indices of the examples of a batch, and the epoch that they are wanted in."""

    epoch = 0


class EpochBatches(BatchSampler):
    """Batches that know their epoch, beginning anywhere in it.

    Its arguments are those of `BatchSampler`, so that Lightning can put another sampler in.

    Attributes:
        first: The batch that the next iteration begins with.
    """

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.first = 0

    def batches(self) -> Iterator[list[int]]:
        """Yield all batches of an epoch."""
        yield from super().__iter__()

    def __iter__(self) -> Iterator[list[int]]:
        first, self.first = self.first, 0
        epoch, count = getattr(self.sampler, "epoch", 0), len(self)
        batches = self.batches()
        for i, indices in enumerate(islice(batches, count)):
            batch = Batch(chain(indices, *batches) if i == count - 1 else indices)  # the last has what others have not
            batch.epoch = epoch
            if i >= first:
                yield batch


class EpochLoader(DataLoader[Any]):
    """A loader that asks its sampler when the first batch is wanted, and not when the iterator is made.

    Lightning makes the iterator before it says which epoch it is for, and workers fetch ahead. Its state, which
    Lightning keeps and gives back, is the batch that the next iteration begins with.
    """

    def state_dict(self) -> dict[str, int]:
        """Return where the next iteration begins."""
        return {"first": getattr(self.batch_sampler, "first", 0)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration in the middle of an epoch.

        Raises:
            ValueError: Its batches cannot.
        """
        if not isinstance(self.batch_sampler, EpochBatches):
            raise ValueError(f"{type(self.batch_sampler).__name__} cannot begin at batch {state['first']}")
        self.batch_sampler.first = state["first"]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


def check_loading(batch_size: int, workers: int, seed: int, limit_train: int | None) -> None:
    """Check what all data are told of their loading.

    Raises:
        ValueError: A number is out of range.
    """
    check_integer("data.batch_size", batch_size, 1)
    check_integer("data.workers", workers, 0)
    check_integer("data.seed", seed, 0, LARGEST_SEED)
    if limit_train is not None:
        check_integer("data.limit_train", limit_train, 1)


def training_loader(
    examples: Any,
    trainer: pl.Trainer | None,
    *,
    seed: int,
    batch_size: int,
    batches: type[EpochBatches] = EpochBatches,
    **options: Any,
) -> EpochLoader:
    """Return shuffled batches of one size; a last smaller one is dropped unless it is the only one.

    Args:
        examples: The examples, of which a process gets its share.
        trainer: Knows the processes; None is one.
        seed: Of the order.
        batch_size: Of one process.
        batches: How examples are put together.
        **options: Of the loader.
    """
    sampler = EpochSampler(examples, seed, *_place(trainer))
    return _loader(examples, batches(sampler, batch_size, drop_last=len(sampler) >= batch_size), **options)


def evaluation_loader(
    examples: Any,
    trainer: pl.Trainer | None,
    *,
    batch_size: int,
    batches: type[EpochBatches] = EpochBatches,
    **options: Any,
) -> EpochLoader:
    """Return batches of all examples, or of this process's share of them; the arguments are those of training."""
    rank, world = _place(trainer)
    sampler: Sampler[int] = ShareSampler(examples, rank, world) if world > 1 else SequentialSampler(examples)
    return _loader(examples, batches(sampler, batch_size, drop_last=False), **options)


def _place(trainer: pl.Trainer | None) -> tuple[int, int]:
    return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)


def _loader(examples: Any, batches: EpochBatches, **options: Any) -> EpochLoader:
    """Return a loader that Lightning leaves as it is, where its batches are shares already."""
    loader = EpochLoader(examples, batch_sampler=batches, **options)
    loader.__dict__["sampler"] = batches.sampler  # which torch sets to another one, and then forbids to set
    return loader


class Seeded(Dataset[Any]):
    """Examples whose random changes follow from a seed, the epoch and their batch; otherwise as they are.

    Args:
        examples: The examples.
        seed: Of the changes.
    """

    def __init__(self, examples: Any, seed: int) -> None:
        self.examples, self.seed = examples, seed

    def __len__(self) -> int:
        return len(self.examples)

    def __getattr__(self, name: str) -> Any:
        if name == "examples":  # not there yet, while a worker unpickles this
            raise AttributeError(name)
        return getattr(self.examples, name)

    def __getitem__(self, index: int) -> Any:
        with drawing_from(key_of(self.seed, index)):
            return self.examples[index]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        with drawing_from(key_of(self.seed, getattr(indices, "epoch", 0), *indices)):
            if hasattr(self.examples, "__getitems__"):
                return self.examples.__getitems__(indices)
            return [self.examples[i] for i in indices]


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and PyTorch on the CPU, and put them back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, which nobody puts back
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def key_of(*numbers: int) -> int:
    """Return a seed that depends on all of some numbers, and is far from that of their neighbours."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
