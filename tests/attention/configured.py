"""The mechanisms as `conf/attention` sets them up."""

from functools import partial

from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.running import CONF as ROOT
from thresher.attention import Mechanism

CONF = ROOT / "attention"


def configured() -> dict[str, partial[Mechanism]]:
    """Return what Hydra makes of every file of `conf/attention`, by file name."""
    return {path.stem: instantiate(OmegaConf.load(path)) for path in sorted(CONF.glob("*.yaml"))}
