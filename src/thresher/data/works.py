"""Books that ship with the package: one work a line, as JSON with `title` and `text`, compressed."""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from importlib.resources import files


def read_works(name: str) -> dict[str, str]:
    """Read the texts of the works in `files/NAME.jsonl.gz`, by title.

    Raises:
        FileNotFoundError: The file is missing from the installation.
        ValueError: It is damaged.
    """
    path = files("thresher.data") / "files" / f"{name}.jsonl.gz"
    try:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        works = [json.loads(line) for line in lines]
        return {work["title"]: work["text"] for work in works}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing from the installation; install thresher again") from error
    except (OSError, EOFError, zlib.error, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); install thresher again") from error


def split_works(name: str, val: Sequence[str], test: Sequence[str]) -> dict[str, list[str]]:
    """Split the texts of a file into `train`, `val` and `test`, the last two given by title."""
    works = read_works(name)
    return {
        "train": [text for title, text in works.items() if title not in (*val, *test)],
        "val": [works[title] for title in val],
        "test": [works[title] for title in test],
    }


def describe_sources(parts: Mapping[str, Sequence[str]], val: Sequence[str], test: Sequence[str]) -> dict[str, str]:
    """Describe the works of each part."""
    shipped = {"train": f"the {len(parts['train'])} other works", "val": ", ".join(val), "test": ", ".join(test)}
    return {part: f"{works}, from the texts that ship with the package" for part, works in shipped.items()}
