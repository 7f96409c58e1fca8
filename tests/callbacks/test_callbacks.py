"""Callbacks around training: calibration, temperature, warnings, progress."""

import warnings
from pathlib import Path

import pytest
import torch

from tests.running import tiny_config
from thresher.budget.calibration import ThresholdProbe
from thresher.callbacks.progress import PlainProgress, TimeLeft, build_progress
from thresher.callbacks.thresholds import AnnealTemperature, CalibrateThresholds
from thresher.checkpoints.load import load_checkpoint
from thresher.checkpoints.weights import load_weights
from thresher.run import train as training
from thresher.run.build import build_data, build_task


def state_of(folder: Path, name: str) -> list[torch.Tensor]:
    state = load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    return [value for key, value in state.items() if key.endswith(f"thresholds.{name}")]


def test_temperature_narrows_geometrically_and_survives_a_continuation(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = ("callbacks.temperature.end=0.25", "attention.gate.tau=1.0", "test=false", "trainer.max_steps=4")
    training.train(tiny_config(folder, *overrides))
    # Set at the start of the last step, at three quarters of the way.
    for tau in state_of(folder, "tau"):
        assert float(tau) == pytest.approx(0.25**0.75)


def test_the_base_follows_the_aim_and_stops_moving_when_the_probe_is_gone(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path / "run", "compute.target=0.3", "trainer.max_epochs=4")
    metrics = training.train(cfg)
    assert metrics["val/kept"] == pytest.approx(0.3, abs=0.08)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_with_dropout_evaluation_has_a_base_of_its_own(rate: float, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    one_batch = (
        "data.limit_train=16",
        "data.augment=none",
        "compute.target=0.3",
        "compute.end=0.5",
        "callbacks.calibrate.window=0",
    )
    cfg = tiny_config(folder, *one_batch, f"+model.pos_drop_rate={rate}", "test=false", "trainer.max_epochs=4")
    training.train(cfg)
    pairs = zip(state_of(folder, "base"), state_of(folder, "eval_base"), strict=True)
    assert all(torch.equal(base, eval_base) == (rate == 0) for base, eval_base in pairs)
    # The last step read its batch with the weights that it left behind, deeper layers behind the base before.
    task = build_task(cfg, data := build_data(cfg))
    load_weights(task, load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"], other_attention=False)
    data.setup("fit")
    probe = ThresholdProbe(task.net.eval())
    probe.level = cfg.compute.target * (1 - cfg.compute.margin)
    task.step(next(iter(data.train_dataloader())))
    if rate:
        torch.testing.assert_close(next(iter(probe.collect().values())), state_of(folder, "eval_base")[0])


def test_without_calibration_thresholds_keep_their_base(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    training.train(tiny_config(folder, "~callbacks.calibrate", "attention.threshold=2.5", "test=false"))
    for base in state_of(folder, "base"):
        assert (base == 2.5).all()


def test_lines_of_progress_show_what_a_step_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training.train(tiny_config(tmp_path / "run", "trainer.max_epochs=1", "test=false", "callbacks.watch.moved=0"))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("100%"))
    for name in ("loss", "acc", "kept", "above aim", "val_acc", "left"):
        assert f"  {name} " in line


def test_initial_calibration_is_done_once_where_there_is_no_target(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    cfg = tiny_config(
        folder,
        "compute=free",
        "callbacks.calibrate.initial=0.5",
        "optimizer.lr=1e-6",
        "optimizer.threshold_lr=1e-6",
        "~callbacks.watch",
    )
    metrics = training.train(cfg)
    assert metrics["val/kept"] == pytest.approx(0.5, abs=0.05)


def test_thresholds_that_do_not_move_are_told(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path / "run", "compute=free", "optimizer.threshold_lr=1e-9", "test=false")
    with pytest.warns(UserWarning, match="thresholds have moved by"):
        training.train(cfg)


def test_thresholds_that_collapse_are_told(tmp_path: Path) -> None:
    still = ("optimizer.threshold_lr=0.0", "callbacks.watch.moved=0")
    cfg = tiny_config(tmp_path / "run", "compute=free", "attention.threshold=0.0", "test=false", *still)
    with pytest.warns(UserWarning, match="have threshold 0"):
        training.train(cfg)


def test_healthy_thresholds_are_not_warned_about(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        training.train(tiny_config(tmp_path / "run", "compute.target=0.5", "test=false"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CalibrateThresholds(window=2), "window"),
        (lambda: CalibrateThresholds(initial=0.0), "initial"),
        (lambda: CalibrateThresholds(examples=0), "examples"),
        (lambda: AnnealTemperature(end=0.0), "temperature.end"),
    ],
)
def test_values_out_of_range_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_time_left_is_estimated_from_where_the_clock_started(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 130.0, 130.0])
    monkeypatch.setattr("thresher.callbacks.progress.time.monotonic", lambda: next(now))
    left = TimeLeft()
    left.start(0.5)
    assert left.format(0.5) == "?"
    assert left.format(0.75) == "00:30"


def test_a_snapshot_makes_lightning_report_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        training.train(tiny_config(tmp_path / "run", "test=false", "callbacks.watch.moved=0"))
    assert any("compute budget" in record.getMessage() for record in caplog.records)
    assert not [record.getMessage() for record in caplog.records if "weights_only" in record.getMessage()]


def test_plain_lines_say_how_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(build_progress(), PlainProgress)
    training.train(tiny_config(tmp_path / "run", "test=false"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "epoch" in line]
    assert len(lines) >= 2
    for word in ("loss", "acc", "kept", "above aim", "left"):
        assert word in lines[-1]
    assert lines[-1].startswith("100%")
