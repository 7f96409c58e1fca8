"""Read text files in UTF-8; refuse others with the line of the first wrong byte."""

import codecs
from pathlib import Path

OTHERS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # by their byte order marks, longer ones first


def read_text(path: Path) -> str:
    """Read a file in UTF-8, with or without a byte order mark; line ends stay as they are.

    Raises:
        ValueError: It has another encoding or holds a NUL byte; the message names the line.
    """
    raw = path.read_bytes()
    if other := next((name for mark, name in OTHERS.items() if raw.startswith(mark)), None):
        raise ValueError(
            f"{path} is not UTF-8 text but {other}; convert it, for example with iconv -f {other} -t UTF-8"
        )
    if (place := raw.find(b"\0")) >= 0:
        raise ValueError(
            f"{path}, line {_find_line(raw, place)}: a NUL byte, which is not text; convert UTF-16 files, for "
            "example with iconv"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = _find_line(error.object, error.start), error.object[error.start]
        raise ValueError(
            f"{path} is not UTF-8 text: line {line} has byte 0x{byte:02x} ({error.reason}); convert it, for example "
            "with iconv -f latin1 -t UTF-8"
        ) from error


def _find_line(raw: bytes, place: int) -> int:
    return raw.count(b"\n", 0, place) + 1
