"""Train a network: `python train.py [overrides]`; `python train.py --help` lists what can be overridden."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

CONF = Path(__file__).parent / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> float | None:
    from thresher.cli.main import train

    return train(cfg, CONF)


if __name__ == "__main__":
    from thresher.cli.help import print_help
    from thresher.cli.main import check_arguments, run_hydra
    from thresher.console import end_command

    if {"-h", "--help"} & set(sys.argv):
        end_command(lambda: print_help(CONF, "train"))
    check_arguments(CONF, "train", sys.argv[1:])
    end_command(lambda: run_hydra(main))
