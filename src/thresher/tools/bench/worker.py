"""A process for each row: it starts with fresh memory, and a crash costs one row rather than the run."""

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

PATIENCE = 5  # seconds in which a process may end on its own


class CallResult(NamedTuple):
    """The result of a call in another process.

    Attributes:
        value: The returned value, or None after an error.
        error: Message of an exception, or the end of the process; None if there was none.
        warnings: Messages of warnings.
    """

    value: Any
    error: str | None
    warnings: tuple[str, ...]


class Worker:
    """A process that makes one call after another; `with` ends it."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, function: Callable[..., Any], *args: Any) -> CallResult:
        """Call a function in the process; an exception or the end of the process becomes the error of the result."""
        try:
            self._pipe.send((function, args))
            result: CallResult = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            return CallResult(None, _describe_end(self._process.exitcode), ())
        return result

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._pipe.close()
        if kind is None:
            self._process.join(PATIENCE)
        self._process.terminate()
        self._process.join(PATIENCE)
        if self._process.is_alive():
            self._process.kill()


def run_in_process(function: Callable[..., Any], *args: Any) -> CallResult:
    """Call a function in a new process."""
    with Worker() as worker:
        return worker.call(function, *args)


def _describe_end(code: int | None) -> str:
    if code is not None and code < 0:
        hint = "; the system kills so when memory is short" if -code == signal.SIGKILL else ""
        return f"its process was stopped by {signal.Signals(-code).name}{hint}"
    return f"its process ended with exit code {code}"


def _serve(pipe: Connection) -> None:
    # Ctrl-C reaches every process of a terminal: the one that writes the results down decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    while os.getppid() == parent:
        try:
            function, args = pipe.recv()
        except (EOFError, OSError):
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                value, error = function(*args), None
            except Exception as failure:
                is_message = isinstance(failure, ValueError | OSError)
                value, error = None, str(failure) if is_message else f"{type(failure).__name__}: {failure}"
        messages = tuple(dict.fromkeys(str(w.message).splitlines()[0] for w in caught if _is_shown(w)))
        pipe.send(CallResult(value, error, messages))


def _is_shown(warning: warnings.WarningMessage) -> bool:
    return issubclass(warning.category, UserWarning | RuntimeWarning)
