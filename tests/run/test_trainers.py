"""Trainers: numbers and names that cannot be are told before a training begins, with what there is."""

from pathlib import Path

import pytest

from tests.running import tiny_config
from thresher.run import train as training


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.accumulate_grad_batches=0", r"trainer\.accumulate_grad_batches must be a whole number, at least 1"),
        ("trainer.accumulate_grad_batches=null", r"trainer\.accumulate_grad_batches must be a whole number"),
        ("trainer.log_every_n_steps=-1", r"trainer\.log_every_n_steps must be a whole number, at least 0; got -1"),
        ("trainer.deterministic=yess", r"trainer\.deterministic must be one of True, False, warn, None; got 'yess'"),
        ("trainer.devices=abc", r"trainer: `devices` selected with `CPUAccelerator` should be an int > 0"),
        ("+trainer.max_epoch=3", r"trainer: .*max_epoch"),
        ("trainer.accelerator=tpuu", r"invalid accelerator name: `accelerator='tpuu'`. Available names are"),
        ("trainer.limit_val_batches=-1", r"limit_val_batches"),
        (
            "callbacks.checkpoint.monitor=val/acd",
            r"monitors val/acd, which is not measured; did you mean val/acc\?.*score",
        ),
        ("callbacks.watch.moved=nan", r"callbacks\.watch\.moved must be a finite number, at least 0; got nan"),
        ("callbacks.watch.collapsed=2", r"callbacks\.watch\.collapsed is a share of the heads, at most 1; got 2"),
        ("callbacks.temperature.end=0", r"callbacks\.temperature\.end must be a finite number above 0; got 0"),
        ("callbacks.calibrate.window=2", r"callbacks\.calibrate\.window is a share of the training steps"),
        ("callbacks.calibrate.initial=1.5", r"callbacks\.calibrate\.initial is a share of the pairs, at most 1"),
        ("callbacks.calibrate.examples=0", r"callbacks\.calibrate\.examples must be a whole number, at least 1"),
        ("callbacks.last_checkpoint.every_n_steps=0", r"callbacks\.last_checkpoint\.every_n_steps must be a finite"),
        (
            "task.label_smoothing=null",
            r"task\.label_smoothing must be a finite number, at least 0 and below 1; got None",
        ),
    ],
)
def test_what_cannot_be_is_told_before_the_training(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=message):
        training.train(tiny_config(tmp_path / "run", override))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_entries_of_callbacks_and_loggers_that_are_null_are_left_out(tmp_path: Path) -> None:
    names = "calibrate temperature watch heads checkpoint last_checkpoint learning_rate progress"
    null = [*(f"callbacks.{name}=null" for name in names.split()), "logger.csv=null"]
    metrics = training.train(
        tiny_config(tmp_path / "run", *null, "trainer.max_steps=1", "trainer.limit_test_batches=1")
    )
    assert {"train/loss", "test/loss"} <= metrics.keys()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "data.json", "metrics.json"}
