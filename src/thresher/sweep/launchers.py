"""How a trial is started: as a child process of the driver, or as a job of Slurm.

A job is named by plain values that are kept in the study, so that another driver can look after it when the one that
started it is gone. Its exit code is a file in the trial's folder, written last.
"""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from thresher.sweep import processes
from thresher.sweep.outcome import EXIT_CODE, OUTPUT

Name = dict[str, Any]

# Waits for the word to go, so that nothing runs before the study knows of it; the input closes with a driver that dies.
# The trap keeps the shell alive, to write the exit code, while a signal to the group ends the program.
WAIT_THEN_RUN = """
trap : TERM INT HUP
code=$1; shift
read -r go || exit 1
"$@" </dev/null
echo $? >"$code.new" && mv "$code.new" "$code"
"""


class Launcher(Protocol):
    """Starts trials, and looks after those that it or another driver started."""

    outlives: bool  # whether jobs go on when their driver is interrupted

    def start(self, command: Sequence[str], folder: Path) -> Name:
        """Prepare a job that writes its output and exit code into `folder`; return its name."""

    def release(self, name: Name) -> None:
        """Let a job that was prepared run."""

    def knows(self, name: Name) -> bool:
        """Say whether this launcher can look after a job."""

    def runs(self, name: Name) -> bool:
        """Say whether a job waits or runs."""

    def stop(self, name: Name, force: bool) -> None:
        """End a job, by a request or by force; one that has ended is left alone."""


class Local:
    """Child processes on this machine, each with a process group of its own.

    Args:
        threads: OMP_NUM_THREADS of each, where the environment does not set it; None leaves it alone.
    """

    outlives = False

    def __init__(self, threads: int | None = None) -> None:
        self._environment = dict(os.environ)
        if threads is not None:
            self._environment.setdefault("OMP_NUM_THREADS", str(threads))
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, command: Sequence[str], folder: Path) -> Name:
        shell = ["/bin/sh", "-c", WAIT_THEN_RUN, "trial", str((folder / EXIT_CODE).resolve()), *command]
        with (folder / OUTPUT).open("ab") as output:
            child = subprocess.Popen(
                shell,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        self._children[child.pid] = child
        return {"kind": "local", **processes.identity(child.pid)}

    def release(self, name: Name) -> None:
        pipe = self._children[name["pid"]].stdin
        assert pipe is not None
        try:
            pipe.write(b"go\n")
            pipe.close()
        except BrokenPipeError:
            pass  # it was killed already, which its folder will tell

    def knows(self, name: Name) -> bool:
        return name["kind"] == "local" and processes.is_here(name)

    def runs(self, name: Name) -> bool:
        child = self._children.get(name["pid"])
        if child is None:
            return processes.is_alive(name)
        if child.poll() is None:
            return True
        if child.stdin is not None:
            child.stdin.close()
        return False

    def stop(self, name: Name, force: bool) -> None:
        if not self.runs(name):
            return
        with suppress(ProcessLookupError):
            os.killpg(name["pid"], signal.SIGKILL if force else signal.SIGTERM)


class Submitit:
    """Jobs of Slurm, by way of submitit.

    Args:
        folder: Where submitit keeps its own files; all nodes must see it.
        cluster: `slurm`, or `local` to try it without one.
        parameters: What submitit's executor takes, such as `timeout_min`, `slurm_partition`, `gpus_per_node`.

    Raises:
        ValueError: submitit is not installed, finds no such cluster or knows no such parameter.
    """

    outlives = True

    def __init__(self, folder: Path, cluster: str, parameters: Mapping[str, Any]) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ValueError("launcher=submitit needs submitit: pip install 'thresher[sweep]'") from error
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(**parameters)
        except (RuntimeError, NameError, ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"launcher=submitit with slurm={dict(parameters)}: {error}") from error
        self._folder = folder
        self._cluster = cluster
        self._jobs: dict[str, Any] = {}

    def start(self, command: Sequence[str], folder: Path) -> Name:
        job = self._executor.submit(run_command, list(command), str(folder.resolve()), os.getcwd())
        self._jobs[job.job_id] = job
        return {"kind": self._cluster, "id": job.job_id}

    def release(self, name: Name) -> None:
        pass  # Slurm decides when

    def knows(self, name: Name) -> bool:
        return name["kind"] == self._cluster

    def runs(self, name: Name) -> bool:
        return not self._job(name).done()

    def stop(self, name: Name, force: bool) -> None:
        self._job(name).cancel(check=False)

    def _job(self, name: Name) -> Any:
        if name["id"] not in self._jobs:
            self._jobs[name["id"]] = self._executor._executor.job_class(self._folder, name["id"])
        return self._jobs[name["id"]]


def run_command(command: list[str], folder: str, where: str) -> None:
    """Run a trial inside a job of Slurm."""
    with (Path(folder) / OUTPUT).open("ab") as output:
        code = subprocess.run(
            command, cwd=where, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        ).returncode
    path = Path(folder) / EXIT_CODE
    new = path.with_name(f"{EXIT_CODE}.new")
    new.write_text(f"{code}\n")
    new.replace(path)
