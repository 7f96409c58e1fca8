"""Times as people read them, and text in encodings that lack letters: every text is written, none ends a command."""

import math
import os
import subprocess
import sys

import pytest

from tests.running import CONF
from thresher.callbacks import progress
from thresher.console import UNREAD, format_time

PROGRAM = (
    "from rich.console import Console; from rich.table import Table; from thresher.console import accept_any_text; "
    "accept_any_text(); print('run  →  ü ± 1 … ✨'); t = Table(title='α'); t.add_row('→'); "
    "Console(width=40).print(t, '[bold]→[/]')"
)


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("ascii", "run  ->  ? +- 1 ... ?"),
        ("cp1252", "run  ->  ü ± 1 … ?"),
        ("latin-1", "run  ->  ü ± 1 ... ?"),
        ("utf-8", "run  →  ü ± 1 … ✨"),
    ],
)
def test_what_an_encoding_lacks_is_written_in_ascii(encoding: str, written: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding).splitlines()[0] == written
    assert ("→" if encoding == "utf-8" else "->") in done.stdout.decode(encoding).splitlines()[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00"),
        (59.6, "01:00"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (90_061, "25:01:01"),
        (None, "?"),
        (math.inf, "?"),
    ],
)
def test_a_time_is_written_and_days_do_not_vanish(seconds: float | None, text: str) -> None:
    assert format_time(seconds) == text


def test_the_time_left_of_a_training_counts_beyond_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    left = progress.TimeLeft()
    left.start(0.0)
    assert left.format(0.0) == "?"
    now[0] = 3600.0
    assert left.format(0.02) == "49:00:00"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "command",
    [*(("-m", f"thresher.{name}") for name in ("bench", "report", "export", "testing")), ("eval.py",), ("train.py",)],
    ids=" ".join,
)
def test_a_command_whose_reader_has_gone_ends_without_a_word(command: tuple[str, ...], unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    arguments = [sys.executable, *command, "--help"]
    done = subprocess.run(
        arguments, stdout=writer, stderr=subprocess.PIPE, env=environment, cwd=CONF.parent, text=True, timeout=300
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (UNREAD, "")


def test_every_command_ends_so() -> None:
    commands = [path.read_text() for path in (CONF.parent / "src").rglob("__main__.py")]
    assert len(commands) > 8
    assert all("runpy.run_module(" in text or "    end_command(" in text for text in commands)
