"""ListOps: the grammar, its published statistics, a cache that is the same every time, and training on it."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.running import CONF, run_eval
from thresher.config.overrides import compose_config
from thresher.data.listops import CLOSE, DIGIT, OPERATORS, SYMBOLS, ListOps, apply, draw_tree, draw_trees
from thresher.run import train as training

SHORT = {"train": 64, "val": 16, "test": 16, "min_length": 8, "max_length": 60, "max_depth": 5}


def evaluate(tokens: list[int]) -> int:
    """Evaluate a sequence by a stack, which the generator does not use."""
    stack: list[list[int]] = [[]]
    for token in tokens:
        if token == CLOSE:
            operator, *values = stack.pop()
            stack[-1].append(apply(-operator - 1, values))
        elif token < DIGIT:
            stack.append([-token])
        else:
            stack[-1].append(token - DIGIT)
    ((value,),) = stack
    return value


@pytest.mark.parametrize(
    ("operator", "values", "wanted"),
    [
        ("[MIN", [3, 1, 2], 1),
        ("[MAX", [3, 1, 2], 3),
        ("[MED", [1, 4], 2),
        ("[MED", [9, 1, 4], 4),
        ("[SM", [9, 8, 5], 2),
    ],
)
def test_operators(operator: str, values: list[int], wanted: int) -> None:
    assert apply(OPERATORS.index(operator), values) == wanted


def test_sequences_follow_the_grammar_and_evaluate_to_their_labels() -> None:
    drawn = draw_trees(0, 20, 200, 10, 10)
    trees = [next(drawn) for _ in range(200)]
    for tree in trees:
        assert 20 < len(tree.tokens) < 200
        assert evaluate(tree.tokens) == tree.value
        assert all(1 <= token < len(SYMBOLS) for token in tree.tokens)
    assert len({bytes(tree.tokens) for tree in trees}) == 200
    assert len(SYMBOLS) == 16


def test_a_tree_is_given_up_exactly_when_it_is_too_long() -> None:
    for seed in range(300):
        free = draw_tree(random.Random(seed), 6, 5, 10**9)
        assert free is not None
        bounded = draw_tree(random.Random(seed), 6, 5, 40)
        assert (bounded is None) == (len(free.tokens) >= 40)
        assert bounded is None or bounded == free


@pytest.mark.slow
def test_published_lengths_have_the_measured_statistics() -> None:
    drawn = draw_trees(1, 500, 2000, 10, 10)
    trees = [next(drawn) for _ in range(2000)]
    assert 1000 < np.mean([len(tree.tokens) for tree in trees]) < 1085
    zeros = np.mean([tree.value == 0 for tree in trees])
    assert abs(zeros - 0.171) < 4 * (0.171 * 0.829 / 2000) ** 0.5


def test_the_cache_depends_on_the_seed_and_the_parameters_alone(tmp_path: Path) -> None:
    def made(folder: str, **changes: int) -> ListOps:
        data = ListOps(root=str(tmp_path / folder), **(SHORT | changes))
        data.prepare_data()
        data.setup("fit")
        return data

    one, again, other = made("a"), made("b"), made("a", seed=1)
    batches = [next(iter(data.val_dataloader())) for data in (one, again, other)]
    assert all(torch.equal(x, y) for x, y in zip(batches[0], batches[1], strict=True))
    assert one.path.name == again.path.name != other.path.name
    assert batches[0][0].shape[0] == 16
    written = one.path.stat().st_mtime_ns
    made("a")
    assert one.path.stat().st_mtime_ns == written, "a cache was written again"
    loaders = (one.train_dataloader(), one.val_dataloader(), one.test_dataloader())
    assert [len(loader.dataset) for loader in loaders] == [64, 16, 16]  # type: ignore[arg-type]
    rows = [bytes(x[x > 0].tolist()) for loader in loaders for x, _ in loader.dataset]
    assert len(set(rows)) == 96, "parts overlap"


def test_batches_are_padded_at_the_end_and_keep_their_labels(tmp_path: Path) -> None:
    data = ListOps(root=str(tmp_path), batch_size=16, **SHORT)
    data.prepare_data()
    data.setup("fit")
    tokens, labels = next(iter(data.train_dataloader()))
    assert tokens.dtype == labels.dtype == torch.int64
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        length = sum(token > 0 for token in row)
        assert not any(row[length:])
        assert evaluate(row[:length]) == label
    assert tokens.shape[1] <= data.model_arguments["length"]


def test_the_order_depends_on_its_seed(tmp_path: Path) -> None:
    data = ListOps(root=str(tmp_path), limit_train=32, **SHORT)
    data.prepare_data()
    data.setup("fit")
    first = next(iter(data.train_dataloader()))[1]
    assert torch.equal(first, next(iter(data.train_dataloader()))[1])
    data.set_order_seed(5)
    assert not torch.equal(first, next(iter(data.train_dataloader()))[1])
    assert len(data.train_dataloader().dataset) == 32  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"batch_size": 0}, "data.batch_size must be a whole number, at least 1; got 0"),
        ({"min_length": 60}, "more than data.min_length=60 tokens and fewer than data.max_length"),
        ({"limit_train": 65}, "limit_train=65 but there are 64"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ListOps(**(SHORT | wrong))


def config(folder: Path, *overrides: str):  # type: ignore[no-untyped-def]
    short = [f"data.{key}={value}" for key, value in SHORT.items()]
    quick = ["trainer.max_epochs=1", "trainer.log_every_n_steps=1", "run.name=test", f"run.dir='{folder}/run'"]
    return compose_config(
        CONF, "train", ["data=listops", "model=encoder", f"data.root='{folder}/cache'", *short, *quick, *overrides]
    )


def test_training_and_evaluation_on_tokens(tmp_path: Path) -> None:
    metrics = training.train(config(tmp_path, "attention=topk"))
    assert 0 < metrics["test/kept"] < 0.3
    again = run_eval([f"ckpt='{tmp_path}/run/checkpoints/best.ckpt'"], CONF)
    assert again["test/acc"] == metrics["test/acc"]


def test_a_model_for_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens with model=encoder"):
        training.train(config(tmp_path, "model=vit"))
