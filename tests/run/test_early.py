"""Settings are checked before the data are read, and what the configs choose passes."""

from pathlib import Path

import pytest
from hydra.errors import InstantiationException

from tests.running import CONF, tiny_config
from thresher.attention import Pattern
from thresher.attention.mean import Mean
from thresher.config.overrides import compose_config
from thresher.run.early import check_settings

OURS = ("model=transformer", "data=shakespeare", "task=language_modeling")
CHOICES = [
    f"{group}={path.stem}"
    for group in ("attention", "compute", "optimizer", "scheduler")
    for path in sorted((CONF / group).glob("*.yaml"))
]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_passes(choice: str, tmp_path: Path) -> None:
    check_settings(tiny_config(tmp_path, choice))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attention.threshold=-1.0"], "at least 0"),
        (["attention=mca", "attention.alpha=-1.0"], "alpha must be"),
        (["+attention.unknown=1"], "attention: .*unknown"),
        (["+optimizer.unknown=1"], "optimizer: .*unknown"),
        (["compute.target=2"], "compute.target is a share"),
        (["compute=lagrangian", "compute.rate=0"], "compute.rate must be"),
        (["optimizer.lr=-1"], "optimizer.lr must be"),
        (["optimizer=sgd", "optimizer.momentum=1"], "optimizer.momentum must be"),
        (["scheduler.warmup=2"], "scheduler.warmup is a share"),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_without_data(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, InstantiationException), match=message):
        check_settings(tiny_config(tmp_path, *overrides))


@pytest.mark.parametrize("trainer", ["trainer=gpu", "trainer.accelerator=cuda"])
def test_a_missing_gpu_is_told(trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"torch finds no GPU on this machine\. trainer=cpu runs on the processor"):
        check_settings(tiny_config(tmp_path, trainer))


def test_the_mechanism_of_a_place_is_checked(tmp_path: Path) -> None:
    place = ("attention@model.cross=topk", "model.cross.keys=0", "run.name=x", f"run.dir='{tmp_path}'")
    with pytest.raises(ValueError, match="keys"):
        check_settings(compose_config(CONF, "train", [*OURS, *place]))


def test_a_mechanism_of_somebody_else_may_refuse_the_sizes_of_the_check(tmp_path: Path) -> None:
    target = "tests.run.test_early.Narrow"
    check_settings(tiny_config(tmp_path, "attention=mean", f"attention._target_={target}"))


class Narrow(Mean):
    """A mechanism for few dimensions."""

    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        if head_dim > 64:
            raise ValueError("at most 64 dimensions")
        super().__init__(num_heads, head_dim, pattern)
