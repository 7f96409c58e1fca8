"""Look at this machine and test a model's masks: `python -m thresher.doctor [overrides of conf/doctor.yaml]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from thresher.commands import told

BESIDE_THE_PACKAGE = Path(__file__).parents[3]


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says; return the exit code."""
    root = next((r for r in (Path(), BESIDE_THE_PACKAGE) if (r / "conf" / "doctor.yaml").is_file()), None)
    if root is None:
        print("error: there is no conf/doctor.yaml here: call this in the folder of train.py", file=sys.stderr)
        return 1
    if {"-h", "--help"} & set(arguments):
        print(OmegaConf.load(root / "conf" / "doctor.yaml").help)
        return 0

    def run() -> int:
        from thresher.doctor.command import doctor

        return doctor(root / "conf", list(arguments))

    code: int = told(run)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
