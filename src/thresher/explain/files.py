"""Write an explained example: numbers as NPZ, their meaning as JSON, and a picture of all heads."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from thresher.explain.description import Description


def write_example(
    folder: Path, example: dict[str, Any], description: Description, arrays: list[dict[str, np.ndarray]]
) -> list[Path]:
    """Write `example_N.json`, `.npz` and `.png`; return them.

    Args:
        folder: Folder of the files; created if missing.
        example: Meaning of the arrays.
        description: Description of the example.
        arrays: `weights`, `effective` [h, n, m] and `kept`, boolean, of each layer. They are stored as
            `layer.0.weights`, ..., the first two in fp16, the last in bits along the keys.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"example_{example['example']}.json"
    stored: dict[str, Any] = {} if description.picture is None else {"picture": description.picture}
    for i, layer in enumerate(arrays):
        stored |= {f"layer.{i}.{name}": layer[name].astype(np.float16) for name in ("weights", "effective")}
        stored[f"layer.{i}.kept"] = np.packbits(layer["kept"], axis=-1)
    np.savez_compressed(path.with_suffix(".npz"), **stored)
    path.write_text(json.dumps(example, ensure_ascii=False) + "\n", encoding="utf-8")
    draw_heads(path.with_suffix(".png"), example, description, arrays)
    return [path, path.with_suffix(".npz"), path.with_suffix(".png")]


def draw_heads(
    path: Path, example: dict[str, Any], description: Description, arrays: list[dict[str, np.ndarray]]
) -> None:
    """Draw each head: for a picture the share of queries that keep each patch, for tokens the whole map."""
    from matplotlib.figure import Figure

    most = max(len(layer["weights"]) for layer in arrays)
    figure = Figure(figsize=(1.2 + 1.5 * most, 0.7 + 1.6 * len(arrays)), layout="constrained")
    axes = figure.subplots(len(arrays), most, squeeze=False)
    for line, layer, about in zip(axes, arrays, example["layers"], strict=True):
        for head, axis in enumerate(line):
            axis.set_xticks([])
            axis.set_yticks([])
            if head >= len(layer["weights"]):
                axis.set_visible(False)
                continue
            side = about["keys"]
            if description.grid is not None and description.picture is not None and side is not None:
                height, width = description.picture.shape[:2]
                share = layer["kept"][head].mean(0)[side["extra"] :].reshape(description.grid)
                axis.imshow(description.picture, cmap="gray")
                axis.imshow(share, cmap="viridis", vmin=0, alpha=0.5, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
            else:
                weights = np.abs(layer["weights"][head])
                axis.imshow(weights / np.maximum(weights.max(-1, keepdims=True), 1e-30), cmap="viridis", aspect="auto")
            axis.set_title(f"head {head}, kept {about['heads'][head]['kept']:.3f}", fontsize=7)
        line[0].set_ylabel(about["name"], fontsize=6)
    what = "the brighter a patch, the more queries keep it" if description.grid else "rows: queries, columns: keys"
    figure.suptitle(f"example {example['example']}: {what}", fontsize=9)
    figure.savefig(path, dpi=80)
