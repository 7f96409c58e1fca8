"""Format text for terminals: times, characters that the encoding lacks, and readers that have gone, as `head` does."""

import codecs
import math
import os
import sys
from collections.abc import Callable
from typing import NoReturn

ASCII = {"→": "->", "…": "...", "±": "+-", "−": "-", "–": "-", "—": "-", "×": "x", "·": "*", "≤": "<=", "≥": ">="}
ERRORS = "thresher.ascii"
UNREAD = 141  # the exit code that shells give to SIGPIPE


def accept_any_text() -> None:
    """Let standard output and error write every text in any encoding; UTF-8 is unchanged."""
    codecs.register_error(ERRORS, _replace_letters)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a replaced stream may lack it
        if reconfigure is not None and stream.errors in ("strict", "surrogateescape"):
            reconfigure(errors=ERRORS)


def end_command(run: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit with the code that it returns; None is 0.

    Where whoever reads its output has gone, as `head` does after some lines, it ends without a word.
    """
    try:
        try:
            code = run()
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes at its end
        code = UNREAD
    sys.exit(code)


def format_time(seconds: float | None) -> str:
    """Format a time as hours, minutes and seconds."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"


def _replace_letters(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(ASCII.get(letter, "?") for letter in error.object[error.start : error.end]), error.end
