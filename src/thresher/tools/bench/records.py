"""Records: the columns of a row, written to bench.csv and bench.json after each row."""

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thresher.tools.bench.jobs import Job, Scene

FIELDS = (
    *("mechanism", "backend", "pattern", "n", "heads", "head_dim", "dtype"),
    *("fwd_ms", "bwd_ms", "dense_fwd_ms", "dense_bwd_ms", "speedup_fwd", "speedup_fwd_bwd"),
    *("peak_mb", "dense_peak_mb", "kept", "mac_ratio", "rel_error"),
)
MORE = (
    *("what", "model", "setting", "status", "note", "inputs", "batch", "repetitions"),
    *("train_fwd_ms", "dense_train_fwd_ms", "step_ms", "dense_step_ms", "speedup_step"),
    *(f"{x}_{side}" for x in ("fwd_ms", "bwd_ms", "dense_fwd_ms", "dense_bwd_ms") for side in ("low", "high")),
    *("device", "threads", "machine", "torch"),
)


def build_record(job: Job, scene: Scene, measured: Mapping[str, Any], status: str, note: str) -> dict[str, Any]:
    """Build the complete record of a row; a column that was not measured is None."""
    known = {
        "mechanism": job.name,
        "backend": job.backend_label,
        "pattern": job.pattern,
        "n": job.n,
        "heads": scene.heads,
        "head_dim": scene.head_dim,
        "dtype": scene.dtype,
        "what": job.model if job.model in ("attention", "decode") else "train_step",
        "model": None if job.model == "attention" else job.model,
        "setting": job.knobs,
        "status": status,
        "device": scene.device,
        "inputs": "random" if scene.inputs == "random" else "recorded",
        "batch": scene.batch,
    }
    known |= {key: value for key, value in measured.items() if key != "note"}
    known["note"] = "; ".join(x for x in (str(measured.get("note") or ""), note) if x) or None
    assert not (unknown := known.keys() - {*FIELDS, *MORE}), f"no column for {unknown}"
    return {name: _drop_nonfinite(known.get(name)) for name in (*FIELDS, *MORE)}


def write_records(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write all records; each file is replaced as a whole, so that no reader finds it half written."""
    _replace(folder / "bench.json", json.dumps(list(records), indent=1) + "\n")
    path = folder / "bench.csv"
    with path.with_suffix(".part").open("w", newline="") as file:
        writer = csv.DictWriter(file, (*FIELDS, *MORE))
        writer.writeheader()
        writer.writerows(records)
    os.replace(path.with_suffix(".part"), path)


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def _drop_nonfinite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
