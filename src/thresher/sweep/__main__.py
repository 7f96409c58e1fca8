"""Run a sweep, or go on with one: `python -m thresher.sweep [options] [-- overrides of train.py]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from thresher.commands import told

BESIDE_THE_PACKAGE = Path(__file__).parents[3]


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says; return the exit code."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    own, last = list(arguments[:split]), list(arguments[split + 1 :])
    root = next((r for r in (Path(), BESIDE_THE_PACKAGE) if (r / "conf" / "sweep.yaml").is_file()), None)
    if root is None:
        print("error: there is no conf/sweep.yaml here: call this in the folder of train.py", file=sys.stderr)
        return 1
    if not arguments or {"-h", "--help"} & set(own):
        print(OmegaConf.load(root / "conf" / "sweep.yaml").help)
        return 0

    def run() -> int:
        from thresher.sweep.command import sweep

        return sweep(root, own, last)

    code: int = told(run)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
