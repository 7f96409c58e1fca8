"""A run that goes on from the end of an epoch ends with the weights of one that was never interrupted."""

from pathlib import Path

import pytest
import torch

from tests.running import tiny_config
from thresher import cli
from thresher.checkpoint import load

EVERY_EPOCH = (
    "+callbacks.last_checkpoint.save_top_k=-1",
    "callbacks.last_checkpoint.filename='epoch{epoch}'",
    "+callbacks.last_checkpoint.auto_insert_metric_name=false",
)
QUIET = (
    "test=false",
    "callbacks.watch.moved=0",
    "data.limit_train=32",
    "data.batch_size=8",
    "callbacks.temperature.end=0.3",
)


@pytest.mark.filterwarnings("ignore:.*dirpath has changed")
@pytest.mark.parametrize(
    "overrides",
    [
        ("attention=latte", "compute=lagrangian", "compute.quantity=macs", "compute.target=0.6"),
        ("attention=mca", "data.augment=crop_flip"),
        ("attention=yoso", "trainer.accumulate_grad_batches=2"),
        ("attention=smyrf", "attention.cluster=16", "data.workers=2", "data.augment=crop_flip"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_weights_after_an_interruption_are_those_without(overrides: tuple[str, ...], tmp_path: Path) -> None:
    common = (*QUIET, *overrides)
    cli.train(tiny_config(tmp_path / "whole", *EVERY_EPOCH, *common))
    checkpoints = tmp_path / "whole" / "checkpoints"
    first = f"ckpt_path='{checkpoints}/epoch0.ckpt'"
    cli.train(tiny_config(tmp_path / "resumed", *EVERY_EPOCH, *common, first))
    whole = load(checkpoints / "epoch1.ckpt")
    resumed = load(tmp_path / "resumed" / "checkpoints" / "epoch1.ckpt")
    assert whole["global_step"] == resumed["global_step"] > 0
    different = [k for k, v in whole["state_dict"].items() if not torch.equal(v, resumed["state_dict"][k])]
    assert not different
