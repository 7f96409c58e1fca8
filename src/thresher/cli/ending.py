"""Record the failure of a run in its folder: an exit code, and the reason as the last line of its log."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from thresher.signals import Interrupted

EXIT_CODE = "exit_code"  # as a sweep writes it for its trials

Result = TypeVar("Result")


def record_failure(run: Callable[[], Result], folder: Path | None, describe: Callable[[BaseException], str]) -> Result:
    """Run; on failure write the exit code into the folder, so that the run does not appear to be running.

    Args:
        run: Trains.
        folder: Of the run; None records nothing.
        describe: Turns an exception into a message.
    """
    if folder is None:
        return run()
    path = folder / EXIT_CODE
    path.unlink(missing_ok=True)  # of an attempt that this one resumes
    try:
        return run()
    except BaseException as error:
        code = error.code if isinstance(error, Interrupted) else 130 if isinstance(error, KeyboardInterrupt) else 1
        if folder.is_dir():
            _log(describe(error))
            path.write_text(f"{code}\n")
        raise


def _log(message: str) -> None:
    """Write an error into log files, and not to the terminal, where the command prints it."""
    record = logging.LogRecord("thresher", logging.ERROR, __file__, 0, message, None, None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
