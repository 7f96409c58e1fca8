"""Books that ship with the package: one work a line, as JSON with `title` and `text`, compressed."""

import gzip
import json
import zlib
from importlib.resources import files


def read_works(name: str) -> dict[str, str]:
    """Return the texts of the works in `files/NAME.jsonl.gz` by title.

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
