"""Numbers and data that cannot be: each trial is one message that says what was asked and what there is.

They go through the functions that train.py and eval.py call, in the same order; test_bad_commands.py has the commands.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from tests.running import CONF, TINY, run_eval
from thresher.attention import Call, Pattern, available, find
from thresher.budget.meter import ComputeMeter
from thresher.budget.ratio import ComputeRatio
from thresher.cli import main as commands
from thresher.config import overrides
from thresher.run import train as training
from thresher.run.build import build_data
from thresher.testing.inputs import attend, draw

QUICK = (*TINY, "trainer.max_epochs=1", "callbacks=none")
ENCODER = ("model=encoder", "model.dim=8", "model.depth=1", "model.num_heads=2", "model.ffn_dim=8")
TEXTS = ("data=text_files", "task=text_classification", "data.length=32", *ENCODER)
PICTURES = ("data=image_folder", "data.image_size=16", "data.val_fraction=0.2")
LISTOPS = (
    *("data=listops", "data.train=8", "data.val=2", "data.test=2", "data.min_length=5", "data.max_length=20"),
    *("data.max_depth=3", "data.max_args=3", *ENCODER),
)
CORPUS = ("data=text_corpus", "task=language_modeling", "data.context=16")


def message(folder: Path, *arguments: str) -> str:
    """Return what train.py would say of its arguments, in this process."""
    groups = {argument.partition("=")[0] for argument in arguments}
    own = [o for o in QUICK if o.partition("=")[0].partition(".")[0] not in groups & {"model", "data"}]

    def run() -> None:
        overrides.check(CONF, "train", arguments)
        cfg = overrides.compose_config(CONF, "train", [*own, f"run.dir='{folder}/run'", *arguments])
        commands.check_config(cfg)
        training.train(cfg)

    with pytest.raises(Exception, match=r".") as caught:
        run()
    error: BaseException = caught.value
    while isinstance(error, commands.InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    named = (ValueError, OSError, ImportError, OmegaConfBaseException)
    assert isinstance(error, named) or type(error).__name__ == "MisconfigurationException", repr(error)
    return commands.find_reason(caught.value)


# Numbers


@pytest.mark.usefixtures("unchecked_shapes")  # a user has no checks of annotations
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("attention=topk attention.keys=0", r"keys must be a number of keys >= 1 or a share in (0, 1], got 0"),
        ("attention=topk attention.keys=-3", "keys must be a number of keys >= 1"),
        ("attention=topk attention.keys=1.5", "keys must be a number of keys >= 1"),
        ("attention=topk attention.keys=nan", "keys must be a number of keys >= 1"),
        ("attention.threshold=nan", "threshold must be a finite number, at least 0; got nan"),
        ("attention.threshold=-inf", "threshold must be a finite number, at least 0; got -inf"),
        ("attention.gate.tau=inf", "gate.tau must be a finite number above 0; got inf"),
        ("attention.estimate.bits=3", "estimate.bits must be one of 2, 4, 8, exact; got 3"),
        ("attention.always_keep=-1", "always_keep must be a whole number, at least 0; got -1"),
        ("attention=smyrf attention.cluster=0", "cluster must be a whole number, at least 1; got 0"),
        ("attention=smyrf attention.rounds=0", "rounds must be a whole number, 1 .. 255; got 0"),
        ("attention=yoso attention.hashes=0", "hashes must be a whole number, at least 1; got 0"),
        ("attention=yoso attention.hash.bits=200", "hash.bits must be a whole number, 0 .. 15; got 200"),
        ("attention=mca attention.alpha=-1", "alpha must be a finite number, at least 0; got -1"),
        ("compute.target=0", "compute.target is a share of dense kept in (0, 1], got 0"),
        ("compute.target=1.5", "compute.target is a share of dense kept in (0, 1], got 1.5"),
        ("compute.target=-1", "compute.target is a share of dense kept in (0, 1], got -1"),
        ("compute.target=nan", "compute.target must be a finite number; got nan"),
        ("compute.weight=inf", "compute.weight must be a finite number above 0; got inf"),
        ("compute.quantity=flops", "compute.quantity must be one of kept, macs; got 'flops'"),
        ("model.num_heads=5", "model.embed_dim=16 cannot be shared evenly by model.num_heads=5"),
        ("model.patch_size=5", "model.patch_size=5 does not divide images of 28 pixels"),
        ("model.depth=0", "model.depth must be a whole number, at least 1; got 0"),
        ("data.batch_size=0", "data.batch_size must be a whole number, at least 1; got 0"),
        ("data.limit_train=99999999", "data.limit_train=99999999 but the training split has 9000 images"),
        ("data.val_fraction=null", "data.val_fraction must be a finite number above 0 and below 1; got None"),
        ("optimizer.lr=nan", "optimizer.lr must be a finite number, at least 0; got nan"),
        ("scheduler.warmup=2", "scheduler.warmup is a share of the steps, at most 1; got 2"),
        ("seed=-1", "seed must be a whole number, 0 .. 4294967295; got -1"),
        ("trainer.max_epochs=-5", "`max_epochs` must be a non-negative integer or -1. You passed in -5"),
        ("callbacks=default callbacks.checkpoint.monitor=val/acd", "which is not measured; did you mean val/acc?"),
    ],
)
def test_a_number_out_of_range_is_told_by_its_name_and_range(arguments: str, said: str, tmp_path: Path) -> None:
    assert said in message(tmp_path, *arguments.split())


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("pattern", list(Pattern))
def test_no_example_no_token_one_token_and_masks_of_zeros(name: str, pattern: Pattern) -> None:
    if pattern not in find(name).supports:
        with pytest.raises(ValueError, match="does not support"):
            find(name)(2, 8, pattern)
        return
    mechanism = find(name)(2, 8, pattern)
    for batch, n in ((0, 3), (2, 0), (2, 1), (0, 0)):
        m = n + 2 if pattern.cross else n
        attended = attend(mechanism, draw(mechanism, batch=batch, lengths=(n, m)))
        assert attended.out.shape[:3] == (batch, 2, n)
        assert attended.out.isfinite().all()
    nothing = Call(queries=torch.zeros(2, 5, dtype=torch.bool), keys=torch.zeros(2, 5, dtype=torch.bool))
    attended = attend(mechanism, draw(mechanism, batch=2, lengths=(5, 5)), nothing)
    assert (attended.out == 0).all()


def test_where_nothing_is_visible_the_share_that_is_kept_is_zero() -> None:
    net = torch.nn.ModuleList([find("latte")(2, 8, Pattern.NONCAUSAL_SELF)])
    meter, ratio = ComputeMeter(net), ComputeRatio("kept")
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    with meter:
        attend(net[0], draw(net[0], batch=2, lengths=(5, 5)), Call(queries=nothing, keys=nothing))
    ratio.update(meter.costs())
    assert float(ratio.compute()) == 0
    assert float(meter.kept().detach()) == 0


# Data


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(12):
        for kind in "ab":
            picture(tmp_path / "pictures" / kind / f"{number}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "truncated"])
def test_an_image_that_cannot_be_read_is_named(content: bytes | None, workers: int, pictures: Path) -> None:
    for path in pictures.glob("a/*.png"):
        path.write_bytes(path.read_bytes()[:100] if content is None else content)
    said = message(
        pictures.parent, *PICTURES, f"data.root='{pictures}'", "data.batch_size=2", f"data.workers={workers}"
    )
    assert "\n" not in said
    assert "/a/" in said
    assert "is not a readable image" in said
    assert said.endswith("repair or remove it")


def test_an_image_that_would_fill_the_memory_is_refused(pictures: Path) -> None:
    bombs = list(pictures.glob("b/*.png"))
    Image.new("1", (20_000, 20_000)).save(bombs[0])
    for path in bombs[1:]:
        path.write_bytes(bombs[0].read_bytes())
    said = message(pictures.parent, *PICTURES, f"data.root='{pictures}'", "data.batch_size=2")
    assert "is not a readable image (Image size (400000000 pixels) exceeds limit" in said
    assert "/b/" in said


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: None, "there is no folder"),
        (lambda root: root.mkdir(), "should hold a folder of images for each class; it holds none"),
        (lambda root: picture(root / "only" / "1.png"), "has a single class, only"),
        (lambda root: root.write_text("x"), "there is no folder"),
    ],
    ids=["missing", "empty", "one class", "a file"],
)
def test_a_folder_without_images_is_named(make: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    make(root)
    found = message(tmp_path, *PICTURES, f"data.root='{root}'")
    assert str(root) in found
    assert said in found


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.csv", None, "there is no file"),
        ("empty.csv", b"", "has no column text, label, only none at all"),
        ("header.csv", b"text,label\n", "holds no texts"),
        ("empty.jsonl", b"", "holds no texts"),
        ("columns.csv", b"a,b\n1,2\n", "has no column text, label, only a, b; name yours by data.text and data.label"),
        ("latin.csv", "text,label\nschön,a\n".encode("latin1"), "is not UTF-8 text"),
        ("half.jsonl", b'{"text": "x", "label": "y"}\n{"text"', "line 2"),
        ("list.jsonl", b"[1]", "line 1: not an object with a text and a label"),
        ("short.csv", b"text,label\nx\n", "line 2: 1 fields where the header has 2"),
        ("one.csv", b"text,label\nx,a\ny,a\n", "has texts of one class only: a"),
        ("few.csv", b"text,label\nx,a\ny,b\n", "has no sequences for"),
        ("table.xlsx", b"PK", "ends in .xlsx; readable are .csv, .tsv, .jsonl and .ndjson"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)
def test_a_file_of_texts_that_cannot_be_used_is_named(
    name: str, content: bytes | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    found = message(tmp_path, *TEXTS, f"data.train='{tmp_path / name}'")
    assert said in found
    assert name in found or "TextFiles" in found


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", None], ids=["empty", "header", "truncated"])
def test_a_damaged_cache_is_named_and_can_be_deleted(content: bytes | None, tmp_path: Path) -> None:
    asked = (*LISTOPS, "data.batch_size=4", f"data.root='{tmp_path / 'cache'}'")
    cfg = overrides.compose_config(CONF, "train", [*QUICK[-2:], "run.name=x", f"run.dir='{tmp_path}/first'", *asked])
    data = build_data(cfg)
    (cache,) = (tmp_path / "cache").glob("*.npz")
    cache.write_bytes(cache.read_bytes()[:-200] if content is None else content)
    assert f"{cache} is damaged" in message(tmp_path, *asked)
    cache.unlink()
    again = build_data(cfg)
    assert (again.get_part("train").tokens == data.get_part("train").tokens).all()


def test_labels_that_the_training_lacks_are_named(tmp_path: Path) -> None:
    rows = "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(40))
    (tmp_path / "train.csv").write_text("text,label\n" + rows)
    (tmp_path / "test.csv").write_text("text,label\nx,c\n")
    said = message(tmp_path, *TEXTS, f"data.train='{tmp_path}/train.csv'", f"data.test='{tmp_path}/test.csv'")
    assert "test.csv has labels that training does not: c" in said


@pytest.mark.parametrize(("label", "seen"), [(10, "0 to 10"), (255, "0 to 255")])
def test_a_label_out_of_range_is_told_with_its_file(label: int, seen: str, tmp_path: Path) -> None:
    def idx(array: np.ndarray) -> bytes:
        return bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()

    labels = np.arange(40, dtype=np.uint8) % 10
    labels[7] = label
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((40, 28, 28), dtype=np.uint8)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    said = message(tmp_path, "data=fashion_mnist", f"data.root='{tmp_path}'")
    assert f"has labels from {seen}; 10 classes go from 0 to 9" in said
    assert "train-images-idx3-ubyte" in said


def test_data_with_another_number_of_classes_than_the_head_are_refused(trained: Path, pictures: Path) -> None:
    ckpt = trained / "checkpoints" / "best.ckpt"
    with pytest.raises(ValueError, match=r"the checkpoint has 10 classes \(T-shirt.*the data have 2 \(a, b"):
        commands_of(f"ckpt='{ckpt}'", "data=image_folder", f"data.root='{pictures}'", f"run.dir='{pictures}-eval'")


def test_weights_of_another_width_are_refused(trained: Path, tmp_path: Path) -> None:
    ckpt = trained / "checkpoints" / "best.ckpt"
    said = message(tmp_path, "model.embed_dim=32", f"init_from='{ckpt}'")
    assert "does not fit this network" in said
    assert "of another shape" in said
    assert "\n" not in said


def commands_of(*arguments: str) -> None:
    run_eval(arguments, CONF)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.max_epochs=abc", "trainer.max_epochs must be a whole number, like"),
        ("data.batch_size=2.5", "data.batch_size must be a whole number, like 16, not 2.5"),
        ("attention.gate.into_scores=maybe", "attention.gate.into_scores must be true or false, not 'maybe'"),
        ("attention.thresholdd=1", "attention has no key 'thresholdd'; did you mean threshold?"),
        ("optimizer.lr=1", "optimizer.lr has no effect on an evaluation"),
        ("attention.threshold=1", "attention.threshold is a starting value"),
        ("seed=1,2", "eval.py takes one value for seed"),
    ],
)
def test_an_evaluation_checks_its_overrides(override: str, said: str, trained: Path) -> None:
    ckpt = trained / "checkpoints" / "best.ckpt"
    with pytest.raises(ValueError, match=r".") as caught:
        commands_of(f"ckpt='{ckpt}'", override)
    assert said in str(caught.value)


def test_a_text_longer_than_the_positions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be " * 1000)
    said = message(
        tmp_path, *CORPUS, f"data.root='{tmp_path}'", "data.context=2048", "model=gpt_small", "model.config.n_layer=1"
    )
    assert (
        "has positions for 1024 tokens, the data have up to 2048: shorten them by data.length or data.context" in said
    )
