"""A cheap trial: reads its overrides, sleeps, writes metrics.json. `run.dir` is the only override it must have."""

import json
import sys
import time
from pathlib import Path


def main(arguments: list[str]) -> int:
    given = dict(a.lstrip("+").split("=", 1) for a in arguments)
    folder = Path(given["run.dir"].strip("'"))
    folder.mkdir(parents=True, exist_ok=True)
    x, seed = float(given.get("x", 0)), float(given.get("seed", 0))
    print(f"x {x} seed {seed}", flush=True)
    if "curve" in given:
        (folder / "csv" / "version_0").mkdir(parents=True)
        log = folder / "csv" / "version_0" / "metrics.csv"
        log.write_text("epoch,step,val/acc,val/kept\n")
        for epoch in range(int(given["curve"])):
            with log.open("a") as file:
                file.write(f"{epoch},{epoch},{x},{1 - x}\n{epoch},{epoch},,\n")
            time.sleep(float(given.get("sleep", 0.05)))
    else:
        time.sleep(float(given.get("sleep", 0.05)))
    if x < 0:
        print("x must not be negative", file=sys.stderr)
        return 3
    metrics = {"test/acc": x + 0.001 * seed, "test/kept": 1 - x}
    if "nan" in given:
        metrics["test/acc"] = None
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
