"""Programs beside Python that some tests need: Debian's chromium, and PostgreSQL's server."""

import os
import shutil
from pathlib import Path

import pytest

VARIABLE = "THRESHER_PROGRAMS"  # "required" in CI, which would otherwise pass with these tests skipped


def missing(reason: str) -> None:
    """Skip the test, or fail it where programs are required."""
    if os.environ.get(VARIABLE) == "required":
        pytest.fail(f"{reason} ({VARIABLE}=required)", pytrace=False)
    pytest.skip(reason)


def chromium() -> str:
    """Return the browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        missing("no chromium is installed to open the page in: apt-get install chromium")
    assert found is not None
    return found


def postgresql() -> Path:
    """Return the folder of the newest server's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    if not found:
        missing("PostgreSQL's server programs are not in /usr/lib/postgresql: apt-get install postgresql")
    if os.geteuid() == 0 and not shutil.which("runuser"):  # the server refuses to run as root
        missing("as root, PostgreSQL needs runuser to run as somebody else")
    return found[-1]
