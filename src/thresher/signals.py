"""Handle signals that stop a training: it finishes its step, writes a snapshot and exits with their code."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """A signal has ended the run.

    Args:
        signum: The signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def code(self) -> int:
        """The exit code of shells for the signal."""
        return 128 + self.signum


class Signals:
    """Receives SIGTERM and SIGINT, and under Slurm SIGUSR1, while entered; only in the main thread.

    While signals are deferred, the first one is kept in `received`, so that the training can stop in order.

    Raises:
        Interrupted: At a signal that is not deferred, or at a second one.
    """

    def __init__(self) -> None:
        self._deferred = False
        self._shared: Any = None  # the waiting process writes its signal here
        self._received = 0
        self._handlers: dict[int, Any] = {}  # the handlers before
        self._process = 0

    @property
    def received(self) -> int:
        """The first deferred signal, of this process or of the waiting one; 0 without one."""
        return self._received or (self._shared.value if self._shared is not None else 0)

    def install(self) -> None:
        """Install the handlers, in place of others."""
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            slurm = [signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else []
            for signum in (signal.SIGTERM, signal.SIGINT, *slurm):
                handler = signal.signal(signum, self._receive)
                self._handlers.setdefault(signum, handler)

    def defer(self) -> None:
        """Keep the first signal in `received` from now on, for a caller that polls it."""
        self._deferred = True

    def raise_at_once(self) -> None:
        """Raise signals as they arrive from now on."""
        self._deferred = False

    @contextmanager
    def share(self, number: Any) -> Iterator[None]:
        """Share a number of multiprocessing with processes that start meanwhile."""
        self._shared = number
        try:
            yield
        finally:
            self._shared = None

    def __enter__(self) -> "Signals":
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the handlers, which belong to this process."""
        return vars(self) | {"_handlers": {}}

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data loading worker, which ends with its parent
        if not self._deferred or self._received:
            raise Interrupted(signum)
        self._received = signum
        announce_stop(signum)


def announce_stop(signum: int) -> None:
    """Announce that a training will stop in order."""
    name = signal.Signals(signum).name
    print(f"{name}: stopping after this step, with a snapshot; once more stops at once", file=sys.stderr, flush=True)
