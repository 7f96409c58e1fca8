"""Load data in an order that depends on seed and epoch alone, so that a resumed run continues with the same batches.

Augmentation depends on the seed, the epoch and the examples of the batch, not on the process, the number of workers or
earlier random numbers. Of several processes each takes every world-th example of one order: together their batches are
the batch of a single process. In an evaluation each example is in one process, and all processes have equally many
batches, since a batch may wait for those of others.
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

LARGEST_SEED = 2**63 - 1  # largest seed of PyTorch


class EpochSampler(DistributedSampler[Any]):
    """The share of a process in all examples, in an order that depends on `seed` and the epoch.

    Args:
        examples: The examples.
        seed: Of the order.
        rank: Of this process.
        world: Number of processes; all get equally many examples, and an epoch skips the remainder.
    """

    def __init__(self, examples: Any, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(examples, num_replicas=world, rank=rank, seed=seed, drop_last=True)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
        yield from order[self.rank : len(self) * self.num_replicas : self.num_replicas].tolist()
        self.epoch += 1  # if nobody calls set_epoch


class ShareSampler(DistributedSampler[Any]):
    """The share of a process in all examples, in their order, without gaps or repeats.

    Its length is the smallest share; the first processes may have one more example.

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
    """The indices of the examples of a batch, and their epoch."""

    epoch = 0


class EpochBatches(BatchSampler):
    """Batches that carry their epoch and can begin anywhere in it.

    Its arguments are those of `BatchSampler`, so that Lightning can replace the sampler.

    Attributes:
        first: The first batch of the next iteration.
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
            batch = Batch(chain(indices, *batches) if i == count - 1 else indices)  # the last batch takes the rest
            batch.epoch = epoch
            if i >= first:
                yield batch


class EpochLoader(DataLoader[Any]):
    """A loader that starts its sampler at the first batch, not when the iterator is created.

    Lightning creates the iterator before it sets the epoch, and workers prefetch. Its state, which Lightning stores and
    restores, is the first batch of the next iteration.
    """

    def state_dict(self) -> dict[str, int]:
        """Store the first batch of the next iteration."""
        return {"first": getattr(self.batch_sampler, "first", 0)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the first batch of the next iteration.

        Raises:
            ValueError: The batch sampler cannot begin there.
        """
        if not isinstance(self.batch_sampler, EpochBatches):
            raise ValueError(f"{type(self.batch_sampler).__name__} cannot begin at batch {state['first']}")
        self.batch_sampler.first = state["first"]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


class TrainingOrder:
    """The seed of the training order: that of the data, unless a run sets another."""

    _order_seed: int

    @property
    def order_seed(self) -> int:
        """Seed of the training order, and of augmentation."""
        return self._order_seed

    def set_order_seed(self, seed: int) -> None:
        """Set the seed of the training order.

        Raises:
            ValueError: It is out of range.
        """
        check_integer("order_seed", seed, 0, LARGEST_SEED)
        self._order_seed = seed


def check_loading(batch_size: int, workers: int, seed: int, limit_train: int | None) -> None:
    """Check the options of loading that all data share.

    Raises:
        ValueError: A number is out of range.
    """
    check_integer("data.batch_size", batch_size, 1)
    check_integer("data.workers", workers, 0)
    check_integer("data.seed", seed, 0, LARGEST_SEED)
    if limit_train is not None:
        check_integer("data.limit_train", limit_train, 1)


def build_training_loader(
    examples: Any,
    trainer: pl.Trainer | None,
    *,
    seed: int,
    batch_size: int,
    batches: type[EpochBatches] = EpochBatches,
    **options: Any,
) -> EpochLoader:
    """Build a loader of shuffled batches of one size; it drops a smaller last batch unless that is the only one.

    Args:
        examples: All examples, of which each process gets its share.
        trainer: Has the number of processes; None means one process.
        seed: Of the order.
        batch_size: Of one process.
        batches: Groups examples into batches.
        **options: Of the loader.
    """
    sampler = EpochSampler(examples, seed, *_find_place(trainer))
    return _build_loader(examples, batches(sampler, batch_size, drop_last=len(sampler) >= batch_size), **options)


def build_evaluation_loader(
    examples: Any,
    trainer: pl.Trainer | None,
    *,
    batch_size: int,
    batches: type[EpochBatches] = EpochBatches,
    **options: Any,
) -> EpochLoader:
    """Build a loader of all examples, or of this process's share; arguments as for training."""
    rank, world = _find_place(trainer)
    sampler: Sampler[int] = ShareSampler(examples, rank, world) if world > 1 else SequentialSampler(examples)
    return _build_loader(examples, batches(sampler, batch_size, drop_last=False), **options)


def _find_place(trainer: pl.Trainer | None) -> tuple[int, int]:
    return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)


def _build_loader(examples: Any, batches: EpochBatches, **options: Any) -> EpochLoader:
    """Build a loader that Lightning does not replace, as its batches are already shares."""
    loader = EpochLoader(examples, batch_sampler=batches, **options)
    loader.__dict__["sampler"] = batches.sampler  # torch sets another one, and then forbids to set it
    return loader


class Seeded(Dataset[Any]):
    """Examples whose augmentation depends on a seed, the epoch and their batch alone.

    Args:
        examples: The examples.
        seed: Of the augmentation.
    """

    def __init__(self, examples: Any, seed: int) -> None:
        self.examples, self.seed = examples, seed

    def __len__(self) -> int:
        return len(self.examples)

    def __getattr__(self, name: str) -> Any:
        if name == "examples":  # not set yet while a worker unpickles this
            raise AttributeError(name)
        return getattr(self.examples, name)

    def __getitem__(self, index: int) -> Any:
        with seed_generators(mix_seed(self.seed, index)):
            return self.examples[index]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        with seed_generators(mix_seed(self.seed, getattr(indices, "epoch", 0), *indices)):
            if hasattr(self.examples, "__getitems__"):
                return self.examples.__getitems__(indices)
            return [self.examples[i] for i in indices]


@contextmanager
def seed_generators(seed: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and PyTorch on the CPU, then restore them."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed GPUs, which are not restored
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def mix_seed(*numbers: int) -> int:
    """Mix numbers into a seed that differs widely for neighbouring numbers."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
