"""ListOps: nested operations on digits, written out as tokens; Long Range Arena's task, generated (arXiv 2011.04006).

A tree is drawn from the top: above `max_depth` each place becomes an operator with probability 0.25, with 2 to
`max_args` arguments, otherwise a digit. Only trees of more than `min_length` and fewer than `max_length` tokens are
kept, each once. With the published lengths, 500 and 2,000, labels are skewed: 17.1 % are 0, which is the accuracy of a
model that learns nothing.
"""

import hashlib
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from rich.progress import track

from thresher.attention.options import check_integer
from thresher.data.sequences import SequenceData, Sequences

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
SYMBOLS = ("padding", *OPERATORS, *map(str, range(10)), "]")
CLOSE = SYMBOLS.index("]")
DIGIT = SYMBOLS.index("0")
OPERATOR_CHANCE = 0.25


class Tree(NamedTuple):
    """A nested operation.

    Attributes:
        tokens: Its symbols, as indices into SYMBOLS.
        value: Its value, 0 to 9.
    """

    tokens: list[int]
    value: int


def apply(operator: int, values: Sequence[int]) -> int:
    """Evaluate an operator, given as an index into OPERATORS; medians are rounded down, sums taken modulo 10."""
    return (min, max, lambda v: int(median(v)), lambda v: sum(v) % 10)[operator](values)


def draw_tree(rng: random.Random, max_depth: int, max_args: int, limit: int, depth: int = 1) -> Tree | None:
    """Draw a tree; None as soon as it has `limit` tokens or more."""
    if depth == max_depth or rng.random() > OPERATOR_CHANCE:
        digit = rng.randrange(10)
        return Tree([DIGIT + digit], digit)
    operator = rng.randrange(len(OPERATORS))
    tokens, values = [1 + operator], []
    for _ in range(rng.randint(2, max_args)):
        argument = draw_tree(rng, max_depth, max_args, limit - len(tokens), depth + 1)
        if argument is None:
            return None
        tokens += argument.tokens
        values.append(argument.value)
        if len(tokens) + 1 >= limit:
            return None
    return Tree([*tokens, CLOSE], apply(operator, values))


def draw_trees(seed: int, min_length: int, max_length: int, max_depth: int, max_args: int) -> Iterator[Tree]:
    """Draw distinct trees of more than `min_length` and fewer than `max_length` tokens, without end."""
    rng, seen = random.Random(seed), set()
    while True:
        tree = draw_tree(rng, max_depth, max_args, max_length)
        if tree is not None and len(tree.tokens) > min_length:
            key = bytes(tree.tokens)
            if key not in seen:
                seen.add(key)
                yield tree


class ListOps(SequenceData):
    """ListOps, generated once and cached on disk. Batches are token ids [b, n], padded with 0, and labels [b].

    Args:
        batch_size: Sequences in a batch of one process.
        workers: Processes that load data; 0 loads them in the training process.
        seed: Of the trees, and of the training order unless `set_order_seed` is called.
        train: Number of training sequences.
        val: Number of validation sequences.
        test: Number of test sequences.
        min_length: Sequences have more tokens than this.
        max_length: Sequences have fewer tokens than this.
        max_depth: Depth at which every argument is a digit.
        max_args: Largest number of arguments.
        limit_train: Number of training sequences to use, from the first; None for all.
        root: Folder of the cache.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        *,
        batch_size: int = 32,
        workers: int = 0,
        seed: int = 0,
        train: int = 96_000,
        val: int = 2_000,
        test: int = 2_000,
        min_length: int = 500,
        max_length: int = 2_000,
        max_depth: int = 10,
        max_args: int = 10,
        limit_train: int | None = None,
        root: str = "~/.cache/thresher/listops",
    ) -> None:
        super().__init__(batch_size=batch_size, workers=workers, seed=seed, limit_train=limit_train)
        self.sizes = {"train": train, "val": val, "test": test}
        for name, size in self.sizes.items():
            check_integer(f"data.{name}", size, 1)
        for name, value, least in (
            ("min_length", min_length, 0),
            ("max_length", max_length, 2),
            ("max_depth", max_depth, 2),
            ("max_args", max_args, 2),
        ):
            check_integer(f"data.{name}", value, least)
        if min_length >= max_length - 1:
            raise ValueError(
                f"sequences have more than data.min_length={min_length} tokens and fewer than "
                f"data.max_length={max_length}: no length is left"
            )
        if limit_train is not None and limit_train > train:
            raise ValueError(f"data.limit_train={limit_train} but there are {train} training sequences")
        self.trees = {
            "seed": seed,
            "min_length": min_length,
            "max_length": max_length,
            "max_depth": max_depth,
            "max_args": max_args,
        }
        self.root = Path(root).expanduser()

    @property
    def class_names(self) -> list[str]:
        """The digits."""
        return [str(digit) for digit in range(10)]

    def symbols(self, ids: Sequence[int]) -> list[str]:
        return [SYMBOLS[i] for i in ids]

    @property
    def model_arguments(self) -> dict[str, int]:
        """Arguments of a model: its sizes."""
        return {"num_classes": 10, "vocabulary": len(SYMBOLS), "length": self.trees["max_length"] - 1}

    @property
    def path(self) -> Path:
        """The file of the cache, named by a hash of the hyper-parameters."""
        asked = json.dumps(self.trees | self.sizes, sort_keys=True)
        return self.root / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.npz"

    def prepare_data(self) -> None:
        """Generate the sequences, unless they are in the cache."""
        if self.path.exists():
            return
        total = sum(self.sizes.values())
        drawn = draw_trees(**self.trees)
        trees = [next(drawn) for _ in track(range(total), description="generating ListOps")]
        self.root.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial.npz")
        np.savez_compressed(
            partial,
            tokens=np.concatenate([np.array(tree.tokens, dtype=np.uint8) for tree in trees]),
            ends=np.cumsum([len(tree.tokens) for tree in trees]),
            labels=np.array([tree.value for tree in trees], dtype=np.uint8),
        )
        partial.replace(self.path)

    def read(self) -> dict[str, Sequences]:
        """Read the sequences from the cache."""
        try:
            with self.path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                tokens, ends, labels = file["tokens"], file["ends"], file["labels"]
        except (BadZipFile, EOFError, OSError, ValueError, KeyError, zlib.error) as error:
            raise ValueError(f"{self.path} is damaged ({error}); delete it, and it is generated again") from error
        drawn = ", ".join(f"{name}={value}" for name, value in self.trees.items())
        parts, first = {}, 0
        for part, size in self.sizes.items():
            start = int(ends[first - 1]) if first else 0
            stop = first + size
            parts[part] = Sequences(tokens[start : int(ends[stop - 1])], ends[first:stop] - start, labels[first:stop])
            first = stop
            self.sources[part] = f"generated: {drawn}"
        return parts
