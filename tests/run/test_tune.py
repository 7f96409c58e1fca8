"""`train.py task=tuning`: thresholds of frozen networks tuned in a run, with its folder, resumption and evaluation."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.run.test_dropin import save_bert
from tests.running import CONF, run_eval, tiny_config
from thresher import load_adapter
from thresher.checkpoints.load import load_checkpoint
from thresher.config.overrides import compose_config
from thresher.run import train as training
from thresher.run import tune as tuning

SHORT = (
    "task=tuning",
    "task.steps=4",
    "task.evaluate_every=2",
    "task.batches=3",
    "task.held_out=1",
    "attention.tail=mean",
    "attention.gate={surrogate: sigmoid, tau: 0.1}",
    "compute=target",
    "compute.target=0.3",
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("dense")
    metrics = training.train(tiny_config(folder, "attention=dense", "compute=free", "trainer.max_epochs=1"))
    return folder / "checkpoints" / "best.ckpt", metrics


def tune(folder: Path, dense: Path, *overrides: str) -> dict[str, float]:
    return training.train(tiny_config(folder, *SHORT, f"init_from='{dense}'", *overrides))


def test_a_trained_network_is_tuned_measured_and_evaluated_again(
    dense: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    path, before = dense
    metrics = tune(tmp_path / "run", path)
    for name in ("acc", "loss"):
        assert metrics[f"test/dense_{name}"] == pytest.approx(before[f"test/{name}"], abs=1e-6)
    assert metrics["test/error"] > 0
    assert metrics["tune/kept"] == pytest.approx(0.3, abs=0.01)
    assert metrics["tune/error"] <= min(metrics["tune/share_error"], metrics["tune/value_error"])
    own, tuned = (
        load_checkpoint(each)["state_dict"] for each in (path, tmp_path / "run" / "checkpoints" / "best.ckpt")
    )
    weights = {name for name in tuned if "mechanism" not in name and name.startswith("net.")}
    assert weights == {name for name in own if name.startswith("net.")}
    assert all(torch.equal(own[name], tuned[name]) for name in weights)
    again = run_eval([f"ckpt={tmp_path}/run/checkpoints/best.ckpt", f"run.dir={tmp_path}/eval"], CONF)
    for name in (each for each in metrics if each.startswith("test/")):
        assert again[name] == metrics[name]
    adapted = run_eval([f"ckpt={path}", f"adapter={tmp_path}/run/adapter", f"run.dir={tmp_path}/adapted"], CONF)
    for name in ("acc", "loss", "kept", "compute"):
        assert adapted[f"test/{name}"] == metrics[f"test/{name}"]
    assert "adapter:" in (tmp_path / "adapted" / "config.yaml").read_text()
    heads = json.loads((tmp_path / "run" / "heads.json").read_text())
    assert len(heads["layers"]) == 2
    rows = (tmp_path / "run" / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "train/error" in rows[0]
    assert "train/kept" in rows[0]


@contextmanager
def stopping_at(last: int) -> Iterator[None]:
    """Interrupt every tuning after so many steps."""
    run: Any = tuning.tune

    def stop(*args: Any, on_step: Any, **options: Any) -> Any:
        def stopped(step: int, measured: Any) -> None:
            on_step(step, measured)
            if step == last:
                raise KeyboardInterrupt

        return run(*args, on_step=stopped, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tuning, "tune", stop)
        yield


def test_a_tuning_that_was_stopped_resumes_to_the_same_end(
    dense: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    whole = tune(tmp_path / "whole", dense[0])
    with stopping_at(3), pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "stopped", dense[0])
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    with pytest.raises(ValueError, match="of a tuning with another weights"):
        tune(tmp_path / "stopped", dense[0], "init_from=null")
    resumed = tune(tmp_path / "stopped", dense[0])
    steps = [
        [row.split(",")[1] for row in (folder / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[1:]]
        for folder in (tmp_path / "whole", tmp_path / "stopped")
    ]
    assert steps[0] == steps[1]
    assert {name: value for name, value in resumed.items() if name != "train/seconds"} == {
        name: value for name, value in whole.items() if name != "train/seconds"
    }


def test_an_embedding_network_is_compared_by_its_hidden_states(tmp_path: Path) -> None:
    model = save_bert(tmp_path / "model")
    own = ("experiment=tune_minilm", f"model.name_or_path='{model}'", f"run.dir='{tmp_path}/run'", "seed=1")
    size = ("data.context=24", "task.steps=2", "task.batches=2", "task.held_out=1", "trainer.limit_test_batches=2")
    metrics = training.train(compose_config(CONF, "train", [*own, *size, "compute.target=0.3"]))
    assert 0 < metrics["test/cosine"] < 1
    assert metrics["test/error"] > 1e-4
    assert "test/acc" not in metrics
    bert = transformers.BertModel.from_pretrained(model, add_pooling_layer=False)
    names = load_adapter(bert, tmp_path / "run" / "adapter")
    assert len(names) == 2


def test_a_network_in_bf16_is_tuned_in_a_run(dense: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    metrics = tune(tmp_path / "run", dense[0], "trainer.precision=bf16-true", "task.steps=2")
    assert 0 <= metrics["tune/error"] < 1
    assert 0 <= metrics["test/acc"] <= 1


def test_a_language_model_is_compared_by_its_logits(tmp_path: Path) -> None:
    small = ("model=transformer", "model.dim=16", "model.depth=1", "model.num_heads=2", "model.ffn_dim=24")
    data = ("data=shakespeare", "data.context=32", "data.batch_size=8", "trainer.limit_test_batches=2", "run.name=test")
    overrides = [*small, *data, *SHORT, "task.steps=0", f"run.dir='{tmp_path}/run'"]
    metrics = training.train(compose_config(CONF, "train", overrides))
    assert metrics["tune/error"] == min(metrics["tune/share_error"], metrics["tune/value_error"])
    assert metrics["test/perplexity"] != metrics["test/dense_perplexity"]
    assert metrics["test/dense_perplexity"] > 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["compute=free"], "set compute.target"),
        (["compute.quantity=macs"], "compute.quantity=kept"),
        (["compile=true"], "set compile=false"),
        (["resume=never", "task.output=nowhere"], "has no such module; it has"),
        (["task.labels=1"], "task.labels"),
        (["task.steps=-1"], "task.steps"),
        (["attention=topk"], "no trainable thresholds to tune"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_that_cannot_tune_says_why(overrides: list[str], message: str, tmp_path: Path) -> None:
    given = [each for each in SHORT if not (overrides[0] == "attention=topk" and each.startswith("attention."))]
    given = [each for each in given if overrides[0] != "compute=free" or not each.startswith("compute")]
    with pytest.raises(Exception, match=message):
        training.train(tiny_config(tmp_path / "run", *given, *overrides))


def test_settings_of_a_training_are_refused(dense: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", *SHORT)
    idle = {"optimizer.lr=1": "task.lr", "trainer.max_epochs=2": "task.steps", "callbacks=ema": "", "task.clip=2": ""}
    for given, instead in idle.items():
        with pytest.raises(ValueError, match=f"{given.partition('=')[0]}.* has no effect with task=tuning.*{instead}"):
            training.train(config, overrides=["task=tuning", given])


def test_an_adapter_brings_its_own_mechanism_and_belongs_to_one_network(
    dense: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="brings its own mechanisms: leave out attention"):
        run_eval([f"ckpt={dense[0]}", "adapter=x", "attention=topk"], CONF)
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        run_eval([f"ckpt={dense[0]}", f"adapter={tmp_path}", f"run.dir={tmp_path}/none"], CONF)
    tune(tmp_path / "run", dense[0], "task.steps=0")
    other = tmp_path / "other"
    training.train(tiny_config(other, "attention=dense", "compute=free", "trainer.max_epochs=1", "seed=1"))
    with pytest.raises(ValueError, match="with other weights"):
        run_eval(
            [f"ckpt={other}/checkpoints/best.ckpt", f"adapter={tmp_path}/run/adapter", f"run.dir={tmp_path}/wrong"],
            CONF,
        )


def test_held_out_batches_come_from_all_over_the_data() -> None:
    assert list(tuning.spread(range(100), 4)) == [0, 25, 50, 75]
    assert list(tuning.spread(range(3), 8)) == [0, 1, 2]
