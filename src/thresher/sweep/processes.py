"""Who is who: a process of some machine, told apart from another that has its number now."""

import os
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any


@cache
def machine() -> str:
    """Return what identifies this machine since it was started, and this container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def identity(pid: int) -> dict[str, Any]:
    """Return what a process can be recognised by later, from any machine."""
    return {"machine": machine(), "pid": pid, "born": _born(pid)}


def is_here(process: Mapping[str, Any]) -> bool:
    """Say whether a process belongs to this machine, so that `is_alive` can judge it."""
    return process["machine"] == machine()


def is_alive(process: Mapping[str, Any]) -> bool:
    """Say whether a process of this machine still runs; one that has ended and was not waited for does not."""
    pid = process["pid"]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    born = _born(pid)
    return bool(born == process["born"])


def _born(pid: int) -> str:
    """Return when a process was started, Z where it has ended, nothing where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "Z" if fields[0] in "ZX" else fields[19]
