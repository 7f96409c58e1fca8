"""A training that takes seconds: the real command, on a few of the real images, with a tiny network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from thresher.config.evaluation import read_request
from thresher.config.overrides import compose_config

CONF = Path(__file__).parent.parent / "conf"
TINY = (
    "data.limit_train=64",
    "data.batch_size=16",
    "model.embed_dim=16",
    "model.depth=2",
    "model.num_heads=2",
    "trainer.max_epochs=2",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "trainer.log_every_n_steps=1",
    "run.name=test",
)


def tiny_config(folder: Path, *overrides: str) -> DictConfig:
    """Compose conf/train.yaml for a tiny run into `folder`."""
    return compose_config(CONF, "train", [*TINY, f"run.dir='{folder}'", *overrides])


def run_eval(arguments: Sequence[str], conf: Path = CONF) -> dict[str, float]:
    """Evaluate a checkpoint as eval.py does, in this process."""
    from thresher.run.evaluate import evaluate

    return evaluate(read_request(arguments, conf))


def run_dropin(arguments: Sequence[str], conf: Path = CONF) -> list[dict[str, Any]]:
    """Drop mechanisms in as eval.py does, in this process."""
    from thresher.run.dropin import evaluate

    return evaluate(read_request(arguments, conf))
