"""Trials as jobs of somebody else: submitit's local executor in Slurm's place, and a Ray cluster on this machine."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.sweep.driving import finished, free_port, run, started, trials


@pytest.fixture(scope="module")
def ray() -> Iterator[str]:
    """The address of the dashboard of a cluster that ends with the tests."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # whose sockets allow no long names
        options = [f"--port={free_port()}", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}", "--num-cpus=2"]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *options]
        command += [f"--temp-dir={folder}", "--disable-usage-stats", "--object-store-memory=100000000"]
        with (Path(folder) / "log").open("w") as log:
            head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=5).close()
                break
            except OSError:
                assert head.poll() is None, (Path(folder) / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.5)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            head.terminate()
            try:
                head.wait(60)
            finally:
                if head.poll() is None:
                    os.killpg(head.pid, signal.SIGKILL)


@pytest.fixture(params=["submitit", pytest.param("ray", marks=pytest.mark.slow)])
def cluster(request: pytest.FixtureRequest) -> tuple[str, ...]:
    if request.param == "submitit":
        return ("launcher=submitit", "cluster=local", "+slurm.timeout_min=5")
    return ("launcher=ray", f"ray.address={request.getfixturevalue('ray')}")


def test_jobs_go_on_when_their_driver_is_interrupted_and_the_next_takes_them_over(
    cluster: tuple[str, ...], tmp_path: Path
) -> None:
    points = ("x=0.1,0.2", "sleep=6,7")
    driver = started(tmp_path, *cluster, "workers=2", points=points)
    while len(list(tmp_path.glob("*/output.log"))) < 2:
        time.sleep(0.05)
        assert driver.poll() is None, driver.communicate()[0]
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130, output
    begun = {path.parent.name for path in tmp_path.glob("*/output.log")}
    code, output = run(tmp_path, *cluster, "workers=2", points=points)
    assert code == 0, output
    assert sorted(finished(tmp_path).values()) == [1] * 4
    assert begun <= {path.parent.name for path in tmp_path.glob("*/metrics.json")}
    assert len(list(tmp_path.glob("*/metrics.json"))) == 4
    assert {json.loads(path.read_text())["test/acc"] for path in tmp_path.glob("*/metrics.json")} == {0.1, 0.2}


def test_jobs_fail_with_their_reason_and_are_stopped_when_they_take_too_long(
    cluster: tuple[str, ...], tmp_path: Path
) -> None:
    code, output = run(tmp_path, *cluster, "workers=2", "timeout=8", points=("x=-1,0.5", "sleep=0,90"))
    assert code == 0, output
    assert "failed 3" in output
    failures = sorted(t.user_attrs["failure"] for t in trials(tmp_path) if "failure" in t.user_attrs)
    assert sum("x must not be negative" in failure for failure in failures) == 1
    assert sum("no result after 8 s" in failure for failure in failures) == 2


def test_a_cluster_that_is_not_there_is_told(tmp_path: Path) -> None:
    code, output = run(tmp_path, "launcher=ray", f"ray.address=http://127.0.0.1:{free_port()}", points=("x=0.1",))
    assert code == 1
    assert "launcher=ray finds no cluster at http://127.0.0.1" in output
    assert "Traceback" not in output


def test_what_a_cluster_cannot_be_asked_for_is_told(tmp_path: Path) -> None:
    code, output = run(tmp_path, "launcher=submitit", "cluster=local", "+slurm.partitionn=x", points=("x=0.1",))
    assert code == 1
    assert "launcher=submitit with slurm={'partitionn': 'x'}" in output
