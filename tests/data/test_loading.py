"""How processes share what is evaluated."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from thresher.data.loading import EpochBatches, build_evaluation_loader
from thresher.data.sequences import LengthBatches, Sequences


def sequences(count: int) -> Sequences:
    lengths = np.random.default_rng(0).integers(1, 9, count)
    return Sequences.pack([np.full(n, i) for i, n in enumerate(lengths)], np.arange(count))


def process(rank: int, world: int) -> Any:
    return SimpleNamespace(global_rank=rank, world_size=world)


@pytest.mark.parametrize("kind", [EpochBatches, LengthBatches])
@pytest.mark.parametrize("count", [3, 7, 12, 13, 14, 24, 25, 240, 241])
@pytest.mark.parametrize(("world", "batch_size"), [(1, 4), (2, 1), (2, 3), (2, 4), (3, 4)])
def test_every_process_has_as_many_batches_and_each_example_is_in_one(
    kind: type[EpochBatches], count: int, world: int, batch_size: int
) -> None:
    part = sequences(count)
    shares = []
    for rank in range(world):
        loader = build_evaluation_loader(
            part,
            process(rank, world),
            batch_size=batch_size,
            batches=kind,
            collate_fn=lambda examples: [int(label) for _, label in examples],
        )
        shares.append(list(loader))
        assert len(shares[-1]) == len(loader)
        assert max(map(len, shares[-1])) <= batch_size + (world > 1)
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(count))


def test_fewer_examples_than_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 examples to evaluate are too few for 3 processes: use fewer"):
        build_evaluation_loader(sequences(2), process(0, 3), batch_size=1)
