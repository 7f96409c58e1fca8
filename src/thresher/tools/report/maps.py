"""Attention maps written by `eval.py explain=true`, encoded for the page.

The page gets each row of a map as its largest magnitude, and the rest as signed bytes: +-127 sqrt(|a| / largest), with
an error of at most 1.6 % of the largest. A kept pair is never 0, and the others, to which a tail gives weights, are 0.
"""

import base64
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thresher.results.runs import Run

BUDGET = 16_000_000  # characters of all maps of a page
LAYER = ("name", "attention", "pattern", "queries", "keys", "sampled_values", "heads")
HEAD = ("threshold", "kept", "visible", "ineffective", "rank")


def load_maps(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[str]]:
    """Load the explained examples of runs, as many as a page can hold, and notes about the others."""
    found: list[dict[str, Any]] = []
    problems: list[str] = []
    size, beyond = 0, 0
    for place, run in enumerate(runs):
        for path in sorted((run.folder / "explain").glob("example_*.json"), key=lambda path: (len(path.name), path)):
            if size > BUDGET:
                beyond += 1
                continue
            try:
                example = {"run": place, **_load_example(path)}
            except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
                problems.append(f"{run.name}/explain/{path.name} cannot be read: {error}")
                continue
            size += len(json.dumps(example))
            found.append(example)
    if beyond:
        problems.append(f"{beyond} more examples are not in this page: report on the folders of their runs to see them")
    return found, problems


def _load_example(path: Path) -> dict[str, Any]:
    import numpy as np

    about = json.loads(path.read_text(encoding="utf-8"))
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
        layers = [_encode_layer(layer, i, arrays) for i, layer in enumerate(about["layers"])]
        picture = None if about["picture"] is None else _encode_picture(arrays["picture"])
    texts = [[str(token) for token in text] for text in about["texts"]]
    grid = about["grid"] and [int(side) for side in about["grid"]]
    classes = {key: about[key] and str(about[key]) for key in ("label", "predicted")}
    return {
        "example": int(about["example"]),
        **classes,
        "texts": texts,
        "picture": picture,
        "grid": grid,
        "layers": layers,
    }


def _encode_layer(about: Mapping[str, Any], place: int, arrays: Mapping[str, Any]) -> dict[str, Any]:
    import numpy as np

    weights, effective, kept = (arrays[f"layer.{place}.{name}"] for name in ("weights", "effective", "kept"))
    if weights.ndim != 3 or weights.shape != effective.shape or len(about["heads"]) != len(weights):
        raise ValueError(f"the arrays of layer {place} do not fit each other")
    kept = np.unpackbits(kept, axis=-1, count=weights.shape[2]).astype(bool)
    heads = [{key: head[key] for key in HEAD} for head in about["heads"]]
    return {
        **{key: about[key] for key in LAYER},
        "heads": heads,
        "shape": list(weights.shape),
        "weights": _encode_rows(weights, kept),
        "effective": _encode_rows(effective),
    }


def _encode_rows(rows: Any, kept: Any = None) -> dict[str, Any]:
    """Encode the largest magnitude of each row, and all entries as signed bytes."""
    import numpy as np

    rows = np.nan_to_num(rows.astype(np.float32))
    largest = np.abs(rows).max(-1, keepdims=True)
    share = np.sqrt(np.abs(rows) / np.where(largest == 0, 1, largest))
    signed = np.rint(127 * share) * np.sign(rows)
    if kept is not None:
        signed = np.where(kept, np.where(signed == 0, 1, signed), 0)
    text = base64.b64encode(signed.astype(np.int8).tobytes()).decode()
    return {"largest": [float(f"{x:.3g}") for x in largest.ravel()], "bytes": text}


def _encode_picture(pixels: Any) -> dict[str, Any]:
    import numpy as np

    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise ValueError(f"a picture of {pixels.dtype} {pixels.shape} is none of [h, w, 1 or 3] bytes")
    rgb = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
    return {"height": len(rgb), "width": rgb.shape[1], "rgb": base64.b64encode(rgb.tobytes()).decode()}
