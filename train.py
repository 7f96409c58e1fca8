"""Train a network: `python train.py [overrides]`; `python train.py --help` says what can be overridden."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

CONF = Path(__file__).parent / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> float | None:
    from thresher.commands import train

    return train(cfg)


if __name__ == "__main__":
    from thresher.commands import checked, start

    checked(CONF, "train", sys.argv[1:])
    start(main)
