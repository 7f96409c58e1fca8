"""Training and evaluation, end to end, on real images with a tiny network."""

import csv
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from PIL import Image

from tests.running import CONF, run_eval, tiny_config
from thresher.attention.shared.thresholds import Thresholds
from thresher.checkpoints.load import load_checkpoint
from thresher.run import results
from thresher.run import train as training
from thresher.run.build import build_task
from thresher.tools.export import programs


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What commands say on the terminal, line by line."""
    lines: list[str] = []
    monkeypatch.setattr(results, "rank_zero_info", lines.append)
    return lines


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_everything_it_promises(run: tuple[Path, dict[str, float]]) -> None:
    folder, metrics = run
    written = json.loads((folder / "metrics.json").read_text())
    assert written == pytest.approx(metrics)
    for key in ("test/acc", "test/loss", "test/kept", "test/compute", "train/seconds"):
        assert math.isfinite(written[key])
    assert (folder / "config.yaml").is_file()
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {
        *("best.ckpt", "best.ckpt.sha256", "last.ckpt", "last.ckpt.sha256", "previous.ckpt", "previous.ckpt.sha256"),
    }
    heads = json.loads((folder / "heads.json").read_text())
    assert [layer["name"] for layer in heads["layers"]] == ["blocks.0.attn", "blocks.1.attn"]
    assert all({"threshold", "kept", "compute"} == set(h) for layer in heads["layers"] for h in layer["heads"])
    kept = [h["kept"] for layer in heads["layers"] for h in layer["heads"]]
    assert sum(kept) / len(kept) == pytest.approx(written["test/kept"], abs=1e-6)


def test_a_run_says_what_it_has_read(run: tuple[Path, dict[str, float]], tmp_path: Path, told: list[str]) -> None:
    train, val, test = json.loads((run[0] / "data.json").read_text())["parts"]
    assert [part["examples"] for part in (train, val, test)] == [64, 1000, 2000]
    assert (sum(train["classes"].values()), len(test["classes"])) == (64, 10)
    assert train["left_out"] == {"by data.limit_train=64": 8936}
    assert val["source"] == "held out from train: data.val_fraction=0.1, drawn by data.seed=0"
    run_eval([f"ckpt='{run[0]}/checkpoints/best.ckpt'", f"run.dir='{tmp_path}/eval'"], CONF)
    assert (tmp_path / "eval" / "data.json").read_text() == (run[0] / "data.json").read_text()
    assert told[:3] == [part["line"] for part in (train, val, test)]
    told.clear()
    training.train(tiny_config(tmp_path / "untested", "trainer.max_epochs=1", "test=false"))
    assert told[2] == json.loads((tmp_path / "untested" / "data.json").read_text())["parts"][2]["line"]
    assert told[2] == "test: not read"


def test_a_test_set_that_is_not_there_is_told_before_the_training(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    for i, folder in enumerate(("train/a", "train/b", "val/a", "val/b")):
        (root / folder).mkdir(parents=True)
        for j in range(4):
            Image.new("RGB", (30, 30), (i, j, 9)).save(root / folder / f"{j}.png")
    overrides = (
        "data=image_folder",
        f"data.root='{root}'",
        "data.limit_train=4",
        "data.image_size=28",
        "attention=dense",
    )
    with pytest.raises(FileNotFoundError, match=r"none for the test .*test=false"):
        training.train(tiny_config(tmp_path / "run", *overrides))
    assert not (tmp_path / "run" / "metrics.json").exists()
    training.train(tiny_config(tmp_path / "run", *overrides, "test=false", "data.batch_size=2", "trainer.max_epochs=1"))


def test_rectangular_images_are_trained_tested_and_explained(tmp_path: Path) -> None:
    run = tmp_path / "run"
    metrics = training.train(tiny_config(run, "data.image_size=[28,14]", "model.patch_size=7", "trainer.max_epochs=1"))
    ckpt = f"ckpt='{run}/checkpoints/best.ckpt'"
    again = run_eval([ckpt, "explain=true", f"run.dir='{tmp_path}/eval'"], CONF)
    assert again["test/acc"] == metrics["test/acc"]
    explained = json.loads(next((tmp_path / "eval" / "explain").glob("*.json")).read_text())
    assert (explained["picture"], explained["grid"]) == ([28, 14, 1], [4, 2])
    (images,) = programs.draw_inputs({"image_size": [28, 14], "channels": 1}, 3)
    assert images.shape == (3, 1, 28, 14)


def test_logs_hold_loss_compute_gap_gradients_and_heads(run: tuple[Path, dict[str, float]]) -> None:
    columns = set(rows(run[0])[0])
    wanted = {
        "train/loss",
        "train/acc",
        "train/kept",
        "train/compute",
        "train/gap",
        "thresholds/task_gradient",
        "thresholds/compute_gradient",
        "thresholds/moved",
        "heads/blocks.0.attn.1/threshold",
        "heads/blocks.1.attn.0/kept",
        "val/score",
        "lr-AdamW/thresholds",
    }
    assert wanted <= columns


def test_the_budget_is_followed_even_in_eight_steps(run: tuple[Path, dict[str, float]]) -> None:
    assert run[1]["test/kept"] < 0.9


def test_checkpoints_load_as_weights_only_and_hold_a_plain_config(run: tuple[Path, dict[str, float]]) -> None:
    checkpoint = torch.load(run[0] / "checkpoints" / "last.ckpt", weights_only=True)
    config = checkpoint["thresher"]["config"]
    assert type(config) is dict
    assert json.loads(json.dumps(config)) == config
    assert config["attention"]["name"] == "latte"
    assert "_target_" not in str(checkpoint["thresher"])


def test_the_last_checkpoint_is_the_last_and_the_best_the_best(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    training.train(
        tiny_config(folder, "compute=free", "trainer.max_epochs=3", "optimizer.lr=0.0", *QUIET, "test=false")
    )
    last, best = (load_checkpoint(folder / "checkpoints" / f"{name}.ckpt")["global_step"] for name in ("last", "best"))
    assert (last, best) == (12, 4), "weights that do not move are best in the first epoch"


def test_testing_without_training_needs_a_checkpoint_and_uses_it(run: tuple[Path, dict[str, float]]) -> None:
    with pytest.raises(ValueError, match="say which by ckpt_path"):
        training.train(tiny_config(run[0].parent / "untrained", "train=false"))
    ckpt = f"ckpt_path='{run[0]}/checkpoints/best.ckpt'"
    again = training.train(tiny_config(run[0].parent / "tested", "train=false", ckpt))
    assert again["test/acc"] == run[1]["test/acc"]


def test_a_start_that_failed_does_not_lock_its_folder(tmp_path: Path) -> None:
    with pytest.raises(InstantiationException, match="timm has no model"):
        training.train(tiny_config(tmp_path / "run", "model.name=vit_tinny"))
    training.train(tiny_config(tmp_path / "run", "trainer.max_epochs=1", "test=false"))


def test_infinite_thresholds_are_calibrated_like_any(tmp_path: Path) -> None:
    metrics = training.train(tiny_config(tmp_path / "run", "attention.threshold=inf", "trainer.max_epochs=4"))
    assert 0.05 < metrics["train/kept"] < 0.4


def test_keys_that_are_always_kept_count_towards_the_budget(tmp_path: Path) -> None:
    overrides = ("attention.always_keep=5", "attention.trainable=false", "compute.target=0.2", "trainer.max_epochs=4")
    metrics = training.train(tiny_config(tmp_path / "run", *overrides))
    assert metrics["val/kept"] == pytest.approx(0.2, abs=0.05)


def test_an_average_of_weights_keeps_the_budget(tmp_path: Path) -> None:
    metrics = training.train(
        tiny_config(tmp_path / "run", "callbacks=ema", "trainer.max_epochs=4", "compute.target=0.3")
    )
    assert metrics["val/kept"] == pytest.approx(0.3, abs=0.15)


def test_a_run_is_not_overwritten(run: tuple[Path, Any]) -> None:
    with pytest.raises(ValueError, match="already holds a run: choose"):
        training.train(tiny_config(run[0], "resume=never"))
    with pytest.raises(ValueError, match=r"already holds a run with other settings \(seed: 0 → 1"):
        training.train(tiny_config(run[0], "compute.target=0.5", "seed=1"))


def test_a_run_goes_on_from_its_own_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    training.train(tiny_config(folder, "trainer.max_epochs=1", "test=false"))
    ckpt = folder / "checkpoints" / "last.ckpt"
    steps = load_checkpoint(ckpt)["global_step"]
    with pytest.warns(UserWarning, match=r"with other settings than it began with: trainer\.max_epochs: 1 → 2"):
        training.train(tiny_config(folder, "trainer.max_epochs=2", "test=false", f"resume='{ckpt}'"))
    assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 2 * steps


@pytest.mark.parametrize("attention", sorted(p.stem for p in (CONF / "attention").glob("*.yaml")))
def test_every_mechanism_trains_by_default(attention: str, tmp_path: Path) -> None:
    metrics = training.train(tiny_config(tmp_path / "run", f"attention={attention}", "trainer.max_epochs=1"))
    assert math.isfinite(metrics["test/loss"])


@pytest.mark.parametrize("compute", ["target", "lagrangian", "penalty"])
def test_a_budget_that_nothing_can_follow_is_refused(compute: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"attention=dense.*compute=free"):
        training.train(tiny_config(tmp_path / "run", "attention=dense", f"compute={compute}"))


def test_a_target_below_the_price_of_selection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"selection alone costs 0\.125"):
        training.train(tiny_config(tmp_path / "run", "compute.quantity=macs", "compute.target=0.1"))


def test_a_budget_that_no_epoch_held_is_told(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path / "run", "compute.target=0.05", "trainer.max_epochs=1", "compute.end=1.0", "test=false")
    with pytest.warns(UserWarning, match=r"no epoch held the budget of 0\.05: .* above it"):
        training.train(cfg)


def test_macs_can_be_the_bound(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path / "run", "compute.quantity=macs", "compute.target=0.5", "trainer.max_epochs=4")
    assert training.train(cfg)["train/compute"] == pytest.approx(0.5, abs=0.12)


def test_fixed_thresholds_follow_a_target_by_calibration(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path / "run", "attention.trainable=false", "compute=target", "trainer.max_epochs=4")
    metrics = training.train(cfg)
    assert metrics["train/kept"] < 0.4
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    assert not any(value.any() for key, value in state.items() if key.endswith("thresholds.offset"))


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_the_other_modes_train(mode: str, tmp_path: Path) -> None:
    metrics = training.train(
        tiny_config(tmp_path / "run", f"attention.gate.mode={mode}", "attention.gate.surrogate=sigmoid")
    )
    assert math.isfinite(metrics["test/loss"])


def test_penalty_trains_calibrated_thresholds(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path / "run", "compute=penalty", "callbacks.calibrate.initial=0.5")
    assert training.train(cfg)["train/kept"] < 0.8


def test_accumulation_bf16_and_ema_train(tmp_path: Path) -> None:
    overrides = ("trainer.accumulate_grad_batches=2", "trainer.precision=bf16-mixed", "callbacks=ema")
    metrics = training.train(tiny_config(tmp_path / "run", *overrides))
    assert math.isfinite(metrics["test/loss"])
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(v.dtype == torch.float32 for k, v in state.items() if "thresholds" in k and v.is_floating_point())


class CountGraphs(pl.Callback):
    """Counts the graphs that are compiled up to the end of each epoch, its validation included."""

    counts: ClassVar[list[int]] = []

    def on_train_epoch_end(self, *_: Any) -> None:
        self.counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from the compiler itself
@pytest.mark.parametrize("attention", ["latte", "topk", "yoso", "smyrf", "mca"])
def test_steps_of_one_shape_are_compiled_once(attention: str, tmp_path: Path) -> None:
    """No further graphs after twice as many steps, and a checkpoint that is evaluated as any other."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    CountGraphs.counts.clear()
    options = (f"attention={attention}", "compile=true", "trainer.max_epochs=4", "test=false")
    count = "+callbacks.count._target_=tests.run.test_train.CountGraphs"
    training.train(tiny_config(tmp_path / "run", *options, "trainer.limit_train_batches=2", count))
    assert CountGraphs.counts[3] == CountGraphs.counts[1] > 0
    if attention == "latte":
        run_eval([f"ckpt='{tmp_path}/run/checkpoints/best.ckpt'"], CONF)


@pytest.mark.slow
def test_two_processes_train_as_one_would(tmp_path: Path) -> None:
    metrics = training.train(tiny_config(tmp_path / "run", "trainer=ddp_sim", "trainer.max_epochs=1"))
    assert math.isfinite(metrics["train/loss"])
    assert math.isfinite(metrics["test/loss"])


@pytest.mark.parametrize(("accumulate", "max_steps"), [(1, -1), (2, -1), (1, 11)])
def test_what_is_logged_of_a_step_is_of_that_step(accumulate: int, max_steps: int, tmp_path: Path) -> None:
    """Every third step for the log, and the last one for the metrics, be it an epoch's or not."""
    seen: list[float] = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            seen.append(float(outputs["loss"]) * accumulate)

    options = ["attention=dense", "compute=free", "data.batch_size=8", "trainer.log_every_n_steps=3", "test=false"]
    options += [f"trainer.accumulate_grad_batches={accumulate}", f"trainer.max_steps={max_steps}"]
    cfg = tiny_config(tmp_path / "run", *options)
    made = pl.Trainer.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pl.Trainer,
            "__init__",
            lambda self, *a, callbacks, **k: made(self, *a, callbacks=[*callbacks, Losses()], **k),
        )
        metrics = training.train(cfg)
    with (tmp_path / "run" / "csv" / "version_0" / "metrics.csv").open() as file:
        logged = {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}
    steps = len(seen) // accumulate
    assert set(logged) == set(range(2, steps, 3))
    for step, loss in logged.items():
        assert loss == pytest.approx(seen[(step + 1) * accumulate - 1], rel=1e-6)
    assert metrics["train/loss"] == pytest.approx(seen[-1], rel=1e-6)


def test_a_vanished_data_set_is_one_clear_error(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path / "run", "data=fashion_mnist", f"data.root='{tmp_path}/none'")
    with pytest.raises(FileNotFoundError, match=r"data\.download=true"):
        training.train(cfg)


def test_thresholds_are_clipped_apart_from_weights(tmp_path: Path) -> None:
    from thresher.tasks.optimizer import adamw, parameter_groups

    task = build_task(tiny_config(tmp_path), FakeShape())
    optimizer = adamw(task.net)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 5.0 if group["name"] == "thresholds" else 0.001)
    before = [p.grad.clone() for p in optimizer.param_groups[0]["params"]]
    task.configure_gradient_clipping(optimizer)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, optimizer.param_groups[0]["params"], strict=True))
    offsets = parameter_groups(task.net, 0.1)[2]["params"]
    assert torch.cat([p.grad for p in offsets]).norm() == pytest.approx(1.0, abs=1e-3)


def test_parameter_groups_hold_each_parameter_once(tmp_path: Path) -> None:
    from thresher.tasks.optimizer import parameter_groups

    net = build_task(tiny_config(tmp_path), FakeShape()).net
    groups = {g["name"]: g["params"] for g in parameter_groups(net, 0.1)}
    together = [id(p) for params in groups.values() for p in params]
    assert sorted(together) == sorted(id(p) for p in net.parameters())
    assert {id(p) for p in groups["thresholds"]} == {id(m.offset) for m in net.modules() if isinstance(m, Thresholds)}
    assert id(net.pos_embed) in {id(p) for p in groups["no_decay"]}


QUIET = ("optimizer.threshold_lr=0.0", "callbacks.watch.moved=0")


class FakeShape:
    """The shape of the data, for building a network without reading any."""

    model_arguments: ClassVar[dict[str, int]] = {"num_classes": 10, "channels": 1, "image_size": 28}
    task_arguments: ClassVar[dict[str, int]] = {"num_classes": 10}
