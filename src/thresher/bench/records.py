"""Rows as they are written: one record each, in bench.csv and bench.json, as soon as it is there."""

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thresher.bench.jobs import Job, Scene

FIELDS = (
    *("mechanism", "backend", "pattern", "n", "heads", "head_dim", "dtype"),
    *("fwd_ms", "bwd_ms", "dense_fwd_ms", "dense_bwd_ms", "speedup_fwd", "speedup_fwd_bwd"),
    *("peak_mb", "dense_peak_mb", "kept", "mac_ratio", "rel_error"),
)
MORE = (
    *("what", "model", "setting", "status", "note", "inputs", "batch", "repetitions"),
    *("train_fwd_ms", "dense_train_fwd_ms", "step_ms", "dense_step_ms", "speedup_step"),
    *(f"{x}_{side}" for x in ("fwd_ms", "bwd_ms", "dense_fwd_ms", "dense_bwd_ms") for side in ("low", "high")),
    *("threads", "machine", "torch"),
)


def record_of(job: Job, scene: Scene, measured: Mapping[str, Any], status: str, note: str) -> dict[str, Any]:
    """Return the complete record of a row; what was not measured is None."""
    known = {
        "mechanism": job.name,
        "backend": job.shown_backend,
        "pattern": job.pattern,
        "n": job.n,
        "heads": scene.heads,
        "head_dim": scene.head_dim,
        "dtype": scene.dtype,
        "what": job.model if job.model in ("attention", "decode") else "train_step",
        "model": None if job.model == "attention" else job.model,
        "setting": job.knobs,
        "status": status,
        "inputs": "random" if scene.inputs == "random" else "recorded",
        "batch": scene.batch,
    }
    known |= {key: value for key, value in measured.items() if key != "note"}
    known["note"] = "; ".join(x for x in (str(measured.get("note") or ""), note) if x) or None
    assert not (unknown := known.keys() - {*FIELDS, *MORE}), f"no column for {unknown}"
    return {name: _plain(known.get(name)) for name in (*FIELDS, *MORE)}


def write_records(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write all records; a file is replaced as a whole, so that it is never found half written."""
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


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
