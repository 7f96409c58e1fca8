"""A process of its own for each row: fresh memory, and a crash costs one row, not the run."""

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

PATIENCE = 5  # seconds in which a process may end by itself


class Answer(NamedTuple):
    """What a call in another process came to.

    Attributes:
        value: What it returned, or None.
        error: Why it returned nothing.
        warnings: What it warned of.
    """

    value: Any
    error: str | None
    warnings: tuple[str, ...]


class Worker:
    """A process that makes the calls it is asked for, one after another; `with` ends it."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, function: Callable[..., Any], *args: Any) -> Answer:
        """Call a function of some module there; an exception or the end of the process is an answer, too."""
        try:
            self._pipe.send((function, args))
            answer: Answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            return Answer(None, _ending(self._process.exitcode), ())
        return answer

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


def alone(function: Callable[..., Any], *args: Any) -> Answer:
    """Call a function in a process that exists for this call only."""
    with Worker() as worker:
        return worker.ask(function, *args)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        hint = "; the system kills so when memory is short" if -code == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{hint}"
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
                told_plainly = isinstance(failure, ValueError | OSError)
                value, error = None, str(failure) if told_plainly else f"{type(failure).__name__}: {failure}"
        told = tuple(dict.fromkeys(str(w.message).splitlines()[0] for w in caught if _worth_telling(w)))
        pipe.send(Answer(value, error, told))


def _worth_telling(warning: warnings.WarningMessage) -> bool:
    return issubclass(warning.category, UserWarning | RuntimeWarning)
