"""Evaluate a checkpoint: `python eval.py ckpt=PATH [overrides]`."""

import sys
from pathlib import Path

from omegaconf import OmegaConf

from thresher.console import accept_any_text, end_command

CONF = Path(__file__).parent / "conf"


def main() -> None:
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv):
        accept_any_text()
        print(OmegaConf.load(CONF / "eval.yaml").help)
    else:
        from thresher.cli.main import evaluate

        evaluate(sys.argv[1:], CONF)


if __name__ == "__main__":
    end_command(main)
