"""The order of training as a function of seed and epoch, so that a run that goes on meets the batches that were due.

Random changes of examples are a function of the seed and of the examples of their batch, in whatever process they
are made: they depend neither on the number of workers nor on what was drawn before.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class EpochSampler(Sampler[int]):
    """Every example once, in an order that depends on `seed` and the epoch alone.

    Args:
        data_source: The examples.
        seed: Of the order.
    """

    def __init__(self, data_source: Any, seed: int) -> None:
        self.data_source, self.seed, self.epoch = data_source, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data_source)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(key_of(self.seed, self.epoch))
        yield from torch.randperm(len(self), generator=generator).tolist()
        self.epoch += 1  # where nobody calls set_epoch


class EpochLoader(DataLoader[Any]):
    """A loader that asks its sampler when the first batch is wanted, and not when the iterator is made.

    Lightning makes the iterator before it says which epoch it is for, and workers fetch ahead.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


class Seeded(Dataset[Any]):
    """Examples whose random changes follow from a seed and the batch that they are in; otherwise as they are.

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
        with drawing_from(key_of(self.seed, *indices)):
            if hasattr(self.examples, "__getitems__"):
                return self.examples.__getitems__(indices)
            return [self.examples[i] for i in indices]


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and PyTorch, and put them back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def key_of(*numbers: int) -> int:
    """Return a seed that depends on all of some numbers, and is far from that of their neighbours."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
