"""Evaluate a checkpoint: `python eval.py ckpt=PATH [overrides]`, rebuilt from the checkpoint's own config."""

import sys
from pathlib import Path

from omegaconf import OmegaConf

CONF = Path(__file__).parent / "conf"

if __name__ == "__main__":
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv):
        print(OmegaConf.load(CONF / "eval.yaml").help)
    else:
        from thresher.commands import evaluate

        evaluate(sys.argv[1:], CONF)
