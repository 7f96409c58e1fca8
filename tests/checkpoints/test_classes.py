"""An evaluation needs data with the classes of the checkpoint."""

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.running import CONF, run_eval
from thresher.checkpoints import files
from thresher.checkpoints.format import CLASSES, RECORD
from thresher.config.overrides import compose_config
from thresher.run.train import train

TINY = (
    *("model=encoder", "model.dim=16", "model.depth=1", "model.num_heads=2", "model.ffn_dim=24", "attention=dense"),
    *("compute=free", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.log_every_n_steps=1"),
    *("data=text_files", "data.length=20", "data.batch_size=4", "task=text_classification", "run.name=test"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a training on texts of the classes 0 and 1."""
    folder = tmp_path_factory.mktemp("classes")
    texts = folder / "texts.csv"
    texts.write_text("\n".join(["text,label", *(f"text number {i},{i % 2}" for i in range(40))]))
    train(compose_config(CONF, "train", [*TINY, f"data.train='{texts}'", f"run.dir='{folder}/run'"]))
    return folder / "run"


@pytest.mark.parametrize("classes", [["1", "0"], ["0.0", "1.0"], ["0", "nan"], ["0", "1", "1.0"]])
def test_other_classes_are_refused(run: Path, tmp_path: Path, classes: list[str]) -> None:
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint[RECORD][CLASSES] = classes
    path = tmp_path / "other.ckpt"
    files.write_with_checksum(path, partial(torch.save, checkpoint))
    with pytest.raises(ValueError, match=f"the checkpoint has {len(classes)} classes"):
        run_eval([f"ckpt='{path}'"])
    assert run_eval([f"ckpt='{run}/checkpoints/best.ckpt'", f"run.dir='{tmp_path}/eval'"])["test/loss"] > 0
