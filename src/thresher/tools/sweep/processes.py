"""The identity of a process: its machine, number and start, since numbers are used again."""

import os
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any


@cache
def identify_machine() -> str:
    """Identify this machine since its last boot, and this container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def identify(pid: int) -> dict[str, Any]:
    """Return the identity of a process, for later use on any machine."""
    return {"machine": identify_machine(), "pid": pid, "born": _read_start(pid)}


def is_here(process: Mapping[str, Any]) -> bool:
    """Tell whether a process belongs to this machine, as `is_alive` needs."""
    return process["machine"] == identify_machine()


def is_alive(process: Mapping[str, Any]) -> bool:
    """Tell whether a process of this machine still runs; a zombie does not."""
    pid = process["pid"]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    born = _read_start(pid)
    return bool(born == process["born"])


def _read_start(pid: int) -> str:
    """Read when a process started: Z for a zombie, nothing where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "Z" if fields[0] in "ZX" else fields[19]
