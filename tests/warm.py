"""Run commands as processes of their own that need not import torch, Lightning and timm again.

A tiny training takes a second or two, and the imports before it ten. A server that has imported them, one for each
process of pytest, forks itself for each command. Environment, folder, streams, process group, signals and exit code are
those of a command that a shell starts. Where the imports themselves matter (help, messages before torch, a missing
HOME) tests start a new interpreter instead.
"""

import atexit
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

from tests.running import CONF

ROOT = CONF.parent
SERVER = multiprocessing.get_context("forkserver")
# Without `thresher.cli`, which reads the environment when it is imported.
SERVER.set_forkserver_preload(["thresher.run.train", "thresher.run.evaluate", "timm", "matplotlib.pyplot"])


class Command:
    """A running command; it has the methods of `subprocess.Popen` that tests use.

    Args:
        arguments: A script and its arguments, or "-m", a module and its arguments.
        cwd: Where it runs.
        env: Its whole environment; None is that of this process.
        merge: Whether errors go where the output goes.
    """

    def __init__(
        self, arguments: Sequence[str], cwd: Path = ROOT, env: Mapping[str, str] | None = None, *, merge: bool = False
    ) -> None:
        self.args = list(arguments)
        self._folder = Path(tempfile.mkdtemp())
        self._merge = merge
        environment = dict(os.environ if env is None else env)
        self._process = SERVER.Process(  # type: ignore[attr-defined]
            target=_become, args=(self.args, str(cwd), environment, self._folder, merge)
        )
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode  # type: ignore[no-any-return]

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str | None]:
        """Wait for the end; return output and errors, or None for errors that went where the output goes."""
        self.wait(timeout)
        out, err = ((self._folder / name).read_text(errors="replace") for name in ("out", "err"))
        shutil.rmtree(self._folder, ignore_errors=True)
        return out, None if self._merge else err

    def read(self) -> str:
        """Return what the command has printed so far."""
        out = self._folder / "out"
        return out.read_text() if out.exists() else ""

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> None:
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)


def run(
    arguments: Sequence[str], cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 300
) -> CompletedProcess[str]:
    """Run a command to its end, as `subprocess.run(..., capture_output=True, text=True)` does."""
    command = Command(arguments, cwd, env)
    try:
        out, err = command.communicate(timeout)
    except TimeoutExpired:
        os.killpg(command.pid, signal.SIGKILL)
        raise
    return CompletedProcess(command.args, command.wait(), out, err)


def _become(arguments: list[str], cwd: str, environment: dict[str, str], folder: Path, merge: bool) -> None:
    """Turn this process into the command. Runs in a fork of the server."""
    os.setsid()
    for number, name in ((1, "out"), (2, "out" if merge else "err")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    (folder / "err").touch()
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    _set_threads(environment)
    try:
        os._exit(_execute(arguments))
    finally:
        os._exit(1)


def _set_threads(environment: Mapping[str, str]) -> None:
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))


def _execute(arguments: list[str]) -> int:
    """Run a script or a module as the interpreter does; return the exit code."""
    code: int | str | None = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path.insert(0, "")
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0
