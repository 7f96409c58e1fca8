"""`python -m thresher` lists every command there is, and imports nothing heavy for it."""

import subprocess
import sys
from pathlib import Path

import thresher
from thresher.__main__ import MODULES, SCRIPTS

PACKAGE = Path(thresher.__file__).parent


def test_every_command_is_listed() -> None:
    assert set(MODULES) == {path.parent.name for path in PACKAGE.glob("*/__main__.py")}
    assert all((PACKAGE.parents[1] / command.split()[-1]).is_file() for command in SCRIPTS)


def test_the_list_is_printed_before_torch_is_imported() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "thresher"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "thresher" in imported
    assert not {"torch", "hydra"} & imported
    listed = [line.split("  ")[1] for line in result.stdout.splitlines() if line.startswith("  ")]
    assert listed == [*SCRIPTS, *(f"python -m thresher.{name}" for name in MODULES)]
    assert "docs/start.md" in result.stdout
