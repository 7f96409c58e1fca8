"""The command as a shell sees it: real rows in processes of their own, a failed one among them, and files of all."""

import json
import os
import signal
import subprocess
import time
import warnings
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests import warm
from tests.running import CONF
from tests.tools.bench.small import with_mechanism
from thresher.tools.bench import memory
from thresher.tools.bench.command import bench
from thresher.tools.bench.worker import Worker, run_in_process

ROOT = CONF.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
SMALL = (
    *("heads=2", "head_dim=16", "threads=1", "repetitions=2"),
    *("patterns=noncausal_self", "settings.topk.keys=8"),
)


def test_what_fails_its_check_is_told_and_not_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conf = with_mechanism(tmp_path / "conf", "broken", "tests.attention.broken.forgets_the_scores")
    targets = "targets=[{where: {mechanism: broken}, measure: speedup_fwd, at_least: 1}]"
    code = bench(conf, [*SMALL, "mechanisms=[broken,topk]", "n=[16,32]", targets, f"run.dir='{tmp_path}/out'"])
    assert code == 1
    rows = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(r["mechanism"], r["n"], r["status"]) for r in rows] == [
        *(("broken", n, "FAIL") for n in (16, 32)),
        *(("topk", n, "ok") for n in (16, 32)),
    ]
    assert all("the total cost is not that of dense attention" in r["note"] and r["fwd_ms"] is None for r in rows[:2])
    assert all(r["speedup_fwd_bwd"] > 0 and r["kept"] == 8 / r["n"] for r in rows[2:])
    if memory.can_reset("cpu"):
        assert all(r["peak_mb"] > 0 for r in rows[2:])
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"bench.csv", "bench.json", "bench.png", "bench.html", "bench.yaml"}
    assert OmegaConf.load(tmp_path / "out" / "bench.yaml").n == [16, 32]
    out = capsys.readouterr().out
    assert "FAIL: the total cost is not that of dense attention" in out
    assert "left 00:00:00" in out
    assert "topk (keys 8) auto noncausal_self: forward:" in out
    assert "not measured" in out  # the target of what was not timed
    with pytest.raises(ValueError, match="already holds a benchmark"):
        bench(conf, [*SMALL, f"run.dir='{tmp_path}/out'"])


def test_no_row_begins_after_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*SMALL, "mechanisms=topk", "n=[16,32]", "dtype=[float32,bfloat16]", "memory=false", "limit=0.01"]
    assert bench(CONF, [*given, f"run.dir='{tmp_path}/out'"]) == 0
    rows = json.loads((tmp_path / "out" / "bench.json").read_text())
    found = [(r["dtype"], r["n"], r["device"], r["status"]) for r in rows]
    assert found[0] == ("float32", 16, "cpu", "ok")
    late = [("float32", 32), ("bfloat16", 16), ("bfloat16", 32)]
    assert found[1:] == [(dtype, n, "cpu", "not measured") for dtype, n in late]
    assert rows[1]["fwd_ms"] is None
    assert "it would have begun after limit=0.01 seconds" in rows[1]["note"]
    assert "not measured" in capsys.readouterr().out


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return warm.run(["-m", "thresher.bench", *arguments], env=ENVIRONMENT)


def test_a_mistake_is_one_message(tmp_path: Path) -> None:
    result = call("mechanisms=[lattee]", f"run.dir='{tmp_path}/out'")
    assert result.returncode != 0
    assert "did you mean latte?" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_names_what_there_is() -> None:
    result = call("--help")
    assert result.returncode == 0
    assert "what=train_step" in result.stdout


def test_an_interrupt_keeps_the_rows_that_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    command = ["-m", "thresher.bench", *SMALL, "mechanisms=topk", "memory=false"]
    lengths = f"n=[{','.join(map(str, range(16, 80)))}]"  # more than can be done before it is interrupted
    process = warm.Command([*command, lengths, f"run.dir='{folder}'"], env=ENVIRONMENT)
    try:
        end = time.monotonic() + 240
        while not (folder / "bench.json").exists() and time.monotonic() < end:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT
    assert "SIGINT" in err
    rows = json.loads((folder / "bench.json").read_text())
    assert 1 <= len(rows) < 64
    assert rows[0]["status"] == "ok"
    assert "topk (keys 8)" in out  # the summary of what was measured
    assert (folder / "bench.png").exists()


def test_a_process_that_dies_is_an_answer() -> None:
    answer = run_in_process(os._exit, 3)
    assert answer.value is None
    assert answer.error == "its process ended with exit code 3"


def test_an_exception_and_a_warning_are_answers_too() -> None:
    with Worker() as worker:
        assert worker.call(int, "x").error == "invalid literal for int() with base 10: 'x'"
        assert worker.call(warnings.warn, "slow path").warnings == ("slow path",)
        assert worker.call(int, "7").value == 7
