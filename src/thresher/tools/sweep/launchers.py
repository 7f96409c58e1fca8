"""Launchers: a trial is a child process of the driver, or a job of Slurm or Ray.

A job is named by plain values that are kept in the study, so that another driver can look after it when the one that
started it is gone. Its exit code is a file in the trial's folder, written last.
"""

import os
import shlex
import signal
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from thresher.results.outcome import EXIT_CODE, OUTPUT
from thresher.tools.sweep import processes

JobName = dict[str, Any]

# The trap keeps the shell alive, to write the exit code, while a signal to the group ends the program.
TRIAL = """
trap : TERM INT HUP
code=$1; shift
{first}
"$@" </dev/null
echo $? >"$code.new" && mv "$code.new" "$code"
"""
# Waits for a line of input, so that no trial runs before the study knows it; a dying driver closes the input.
WAITING_TRIAL = TRIAL.format(first="read -r go || exit 1")
# For a shell that a cluster starts, in another folder and with another output.
REMOTE_TRIAL = TRIAL.format(first='exec >>"$1" 2>&1; cd "$2" || exit 1; shift 2')


class Launcher(Protocol):
    """Starts trials, and watches those that it or another driver started."""

    outlives: bool  # whether jobs keep running when their driver is interrupted

    def start(self, command: Sequence[str], folder: Path) -> JobName:
        """Prepare a job that writes its output and exit code into `folder`; return its name."""

    def release(self, name: JobName) -> None:
        """Let a prepared job run."""

    def can_watch(self, name: JobName) -> bool:
        """Tell whether this launcher can watch a job."""

    def is_running(self, name: JobName) -> bool:
        """Tell whether a job waits or runs."""

    def stop(self, name: JobName, force: bool) -> None:
        """Stop a job, by a request or by force; leave an ended one alone."""


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

    def start(self, command: Sequence[str], folder: Path) -> JobName:
        shell = ["/bin/sh", "-c", WAITING_TRIAL, "trial", str((folder / EXIT_CODE).resolve()), *command]
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
        return {"kind": "local", **processes.identify(child.pid)}

    def release(self, name: JobName) -> None:
        pipe = self._children[name["pid"]].stdin
        assert pipe is not None
        try:
            pipe.write(b"go\n")
            pipe.close()
        except BrokenPipeError:
            pass  # it was killed already, which its folder will show

    def can_watch(self, name: JobName) -> bool:
        return name["kind"] == "local" and processes.is_here(name)

    def is_running(self, name: JobName) -> bool:
        child = self._children.get(name["pid"])
        if child is None:
            return processes.is_alive(name)
        if child.poll() is None:
            return True
        if child.stdin is not None:
            child.stdin.close()
        return False

    def stop(self, name: JobName, force: bool) -> None:
        if not self.is_running(name):
            return
        with suppress(ProcessLookupError):
            os.killpg(name["pid"], signal.SIGKILL if force else signal.SIGTERM)


class Submitit:
    """Jobs of Slurm, by way of submitit.

    Args:
        folder: Of submitit's own files; all nodes must see it.
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

    def start(self, command: Sequence[str], folder: Path) -> JobName:
        job = self._executor.submit(run_command, list(command), str(folder.resolve()), os.getcwd())
        self._jobs[job.job_id] = job
        return {"kind": self._cluster, "id": job.job_id}

    def release(self, name: JobName) -> None:
        pass  # Slurm decides when

    def can_watch(self, name: JobName) -> bool:
        return name["kind"] == self._cluster

    def is_running(self, name: JobName) -> bool:
        return not self._job(name).done()

    def stop(self, name: JobName, force: bool) -> None:
        self._job(name).cancel(check=False)

    def _job(self, name: JobName) -> Any:
        if name["id"] not in self._jobs:
            self._jobs[name["id"]] = self._executor._executor.job_class(self._folder, name["id"])
        return self._jobs[name["id"]]


class Ray:
    """Jobs of a Ray cluster, whose nodes see the same folders and have the same environment of Python.

    Args:
        address: Of the cluster's dashboard, as in `http://HEAD:8265`; None takes RAY_ADDRESS or the cluster here.
        parameters: What Ray's `submit_job` takes, such as `entrypoint_num_cpus` and `entrypoint_num_gpus`.

    Raises:
        ValueError: Ray is not installed, or there is no cluster.
    """

    outlives = True

    def __init__(self, address: str | None, parameters: Mapping[str, Any]) -> None:
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise ValueError("launcher=ray needs Ray: pip install 'thresher[ray]'") from error
        try:
            self._client = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = address or "RAY_ADDRESS or on this machine"
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"launcher=ray finds no cluster at {where} ({reason}). `ray start --head` begins one; its dashboard's "
                "address is ray.address"
            ) from error
        self._parameters = parameters
        self._commands: dict[str, list[str]] = {}

    def start(self, command: Sequence[str], folder: Path) -> JobName:
        name = {"kind": "ray", "id": f"thresher-{uuid.uuid4().hex}"}
        files = [str((folder / file).resolve()) for file in (EXIT_CODE, OUTPUT)]
        self._commands[name["id"]] = ["/bin/sh", "-c", REMOTE_TRIAL, "trial", *files, os.getcwd(), *command]
        return name

    def release(self, name: JobName) -> None:
        entrypoint = shlex.join(self._commands.pop(name["id"]))
        try:
            self._client.submit_job(entrypoint=entrypoint, submission_id=name["id"], **self._parameters)
        except TypeError as error:
            raise ValueError(f"launcher=ray with ray={dict(self._parameters)}: {error}") from error

    def can_watch(self, name: JobName) -> bool:
        return name["kind"] == "ray"

    def is_running(self, name: JobName) -> bool:
        try:
            return not self._client.get_job_status(name["id"]).is_terminal()
        except RuntimeError as error:
            if "does not exist" in str(error):  # never submitted, or of a cluster that is gone
                return False
            raise

    def stop(self, name: JobName, force: bool) -> None:
        if self._commands.pop(name["id"], None) is None and self.is_running(name):
            self._client.stop_job(name["id"])


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
