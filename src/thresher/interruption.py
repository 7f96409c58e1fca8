"""Signals that ask a training to stop: it finishes its step, writes a snapshot and says so by its exit code."""

import os
import signal
import sys
import threading
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
        """The exit code that shells give to it."""
        return 128 + self.signum


class Signals:
    """Receives SIGTERM and SIGINT, and under Slurm SIGUSR1, while it is entered; only in the main thread.

    Attributes:
        waiting: Whether somebody asks for `received` often, and may be given the time to stop in order.
        received: The first signal that came while somebody did.

    Raises:
        Interrupted: In whatever runs, at a signal that nobody waits for, or a second one.
    """

    def __init__(self) -> None:
        self.waiting = False
        self.received = 0
        self._before: dict[int, Any] = {}
        self._process = 0

    def install(self) -> None:
        """Take the signals over, from whoever has them."""
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            asked = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [])]
            for signum in asked:
                before = signal.signal(signum, self._receive)
                self._before.setdefault(signum, before)

    def __enter__(self) -> "Signals":
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, before in self._before.items():
            signal.signal(signum, before)
        self._before = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process."""
        return vars(self) | {"_before": {}}

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker that loads data; it ends with the one that started it
        if not self.waiting or self.received:
            raise Interrupted(signum)
        self.received = signum
        name = signal.Signals(signum).name
        print(
            f"{name}: stopping after this step, with a snapshot; once more stops at once", file=sys.stderr, flush=True
        )
