"""A trial that writes when its process began, by the clock that files are stamped with."""

import json
import os
import sys
import time
from pathlib import Path


def began() -> float:
    """Return when this process began, in seconds since the epoch, to a hundredth."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    given = dict(argument.lstrip("+").split("=", 1) for argument in sys.argv[1:])
    folder = Path(given["run.dir"].strip("'"))
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {"test/acc": float(given["x"]), "test/kept": 0.5, "began": began()}
    (folder / "metrics.json").write_text(json.dumps(metrics))
