"""Short trainings one after the other in one process; a line of JSON tells what the process holds after some of them.

python -m tests.faults.soak FOLDER RUNS EVERY
"""

import contextlib
import ctypes
import gc
import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

import torch

from tests.running import tiny_config
from thresher.run import train as training

# Each with a network, data, an optimiser, callbacks, a CSV log and checkpoints of its own; two load data by workers.
KINDS = (
    ("attention=latte", "compute.target=0.5"),
    ("attention=topk",),
    ("attention=smyrf", "data.workers=1"),
    ("attention=yoso", "optimizer=sgd"),
    ("attention=mca", "compute=free"),
    ("attention=latte", "compute=lagrangian", "callbacks=ema", "data.workers=1"),
    ("attention=dense", "compute=free", "data.augment=crop_flip"),
    ("attention=none", "compute=free", "scheduler=constant"),
)
SHORT = ("trainer.max_epochs=1", "data.limit_train=32", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1")


def held() -> dict[str, int]:
    """Return what this process holds: bytes in memory, open files, threads and children.

    What glibc keeps of freed memory is given back first, and pages of files, such as the code of libraries, are not
    counted: both come and go by tens of MiB, whatever this process does.
    """
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    own = Path("/proc/self")
    children = sum(len(task.read_text().split()) for task in own.glob("task/*/children"))
    _, resident, of_files, *_ = map(int, (own / "statm").read_text().split())
    return {
        "memory": (resident - of_files) * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir(own / "fd")),
        "threads": len(os.listdir(own / "task")),
        "children": children,
    }


def main(folder: Path, runs: int, every: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.monotonic()
    for run in range(runs):
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            training.train(tiny_config(folder / str(run), *SHORT, *KINDS[run % len(KINDS)]))
        shutil.rmtree(folder / str(run))
        if (run + 1) % every == 0:
            print(json.dumps({"runs": run + 1, "seconds": round(time.monotonic() - start), **held()}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
