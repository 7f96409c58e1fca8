"""A small copy of a task of GLUE in the files that the package `datasets` writes."""

from collections.abc import Mapping
from pathlib import Path

import datasets

SIZES = {"train": 40, "validation": 8}


def save_glue(folder: Path, texts: Mapping[str, str]) -> None:
    """Write the splits of a task whose columns hold these texts, a number in place of each `{}`; labels alternate."""

    def split(n: int) -> datasets.Dataset:
        columns: dict[str, list[str] | list[int]] = {name: [t.format(i) for i in range(n)] for name, t in texts.items()}
        label = datasets.ClassLabel(names=["no", "yes"])
        features = datasets.Features({name: datasets.Value("string") for name in texts} | {"label": label})
        return datasets.Dataset.from_dict(columns | {"label": [i % 2 for i in range(n)]}, features=features)

    datasets.DatasetDict({name: split(n) for name, n in SIZES.items()}).save_to_disk(str(folder))
