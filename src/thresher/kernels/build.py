"""C++ sources become shared libraries on the machine that runs them, once, when a kernel is first needed.

A library has a plain C interface and includes nothing but the C++ standard library, so that it takes seconds to build
and fits every version of Python and torch. It is built for the processor at hand (`-march=native`) and kept in the
user's cache under a name made from sources, flags, compiler and processor: whatever changes, a new one is built.
Several processes may start at once: one builds, in a folder of its own, and moves the result into place.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

SOURCES = Path(__file__).parent / "csrc"
EXTRA_FLAGS = "THRESHER_CXXFLAGS"  # environment variable: flags that come last, for sanitizers and other processors
REQUIRED = ("-std=c++17", "-O3", "-fPIC", "-pthread")
WELCOME = ("-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi")
TIMEOUT = 600  # seconds that one build may take


class KernelError(RuntimeError):
    """A kernel cannot be built or loaded here; the message says why."""


class Toolchain(NamedTuple):
    """What libraries are built with.

    Attributes:
        compiler: The command, word by word.
        version: What it says about itself.
        extra: Flags that the user adds.
    """

    compiler: tuple[str, ...]
    version: str
    extra: tuple[str, ...]


def toolchain() -> Toolchain:
    """Return the compiler that `CXX` names, or else the first of c++, g++ and clang++ that is found.

    Raises:
        KernelError: There is none, or it does not run.
    """
    named = os.environ.get("CXX")
    compiler = shlex.split(named) if named else [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
    if not compiler or not shutil.which(compiler[0]):
        missing = f"CXX={named} is not there" if named else "there is no C++ compiler (c++, g++, clang++)"
        raise KernelError(f"{missing}; install one, or name it in the environment variable CXX")
    try:
        told = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelError(f"{shlex.join(compiler)} --version fails: {error}") from error
    version = told.stdout.partition("\n")[0]
    return Toolchain(tuple(compiler), version, tuple(shlex.split(os.environ.get(EXTRA_FLAGS, ""))))


def cache_folder() -> Path:
    """Return where libraries are kept: `$XDG_CACHE_HOME/thresher/kernels`, or `~/.cache/thresher/kernels`.

    Raises:
        KernelError: The user has no home.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "thresher" / "kernels"
    except RuntimeError as error:
        raise KernelError(f"there is no folder for built kernels ({error}); set XDG_CACHE_HOME") from error


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """Load the library built from `csrc/<name>.cpp`, building it first if the cache has none that fits.

    Raises:
        KernelError: It cannot be built or loaded. It is not tried again in this process.
    """
    if name not in _failures:
        try:
            return _loaded(name)
        except (KernelError, OSError, subprocess.SubprocessError) as error:
            _failures[name] = f"{name}: {error}"
    raise KernelError(_failures[name])


_failures: dict[str, str] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def usable(name: str) -> bool:
    """Say whether a kernel can be used; the first refusal in a process is explained in one warning."""
    first = not _failures
    try:
        library(name)
    except KernelError as error:
        if first:
            warnings.warn(
                f"the CPU kernels are off, attention runs on PyTorch instead: {error} "
                "(attention.backend=reference is that choice without this warning)",
                RuntimeWarning,
                stacklevel=2,
            )
        return False
    return True


def _loaded(name: str) -> ctypes.CDLL:
    tools = toolchain()
    path = cache_folder() / f"{name}-{_key(name, tools)}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(path.with_suffix(".lock")):
            if not path.is_file():
                _build(name, tools, path)
    return ctypes.CDLL(str(path))


def _key(name: str, tools: Toolchain) -> str:
    text = [*tools.compiler, tools.version, *REQUIRED, *WELCOME, *tools.extra, platform.machine(), _processor()]
    digest = hashlib.sha256("\0".join(text).encode())
    for source in (SOURCES / f"{name}.cpp", *sorted(SOURCES.glob("*.h"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """Return what `-march=native` depends on: a home may be shared by machines with different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    words = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa")
    return "\n".join(sorted({line for line in lines if line.partition("\t")[0].strip() in words}))


def _build(name: str, tools: Toolchain, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        flags = (*REQUIRED, *(f for f in WELCOME if _accepts(tools, f, Path(folder))), *tools.extra)
        command = [*tools.compiler, *flags, "-shared", "-o", str(made), str(SOURCES / f"{name}.cpp")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        if done.returncode or not made.is_file():
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise KernelError(f"{shlex.join(command)} fails: {' '.join(lines[:3]) or done.returncode}")
        os.replace(made, path)


def _accepts(tools: Toolchain, flag: str, folder: Path) -> bool:
    """Compile and link a program of nothing: what is welcome is not known to every compiler."""
    (folder / "nothing.cpp").write_text("int nothing() { return 0; }\n")
    command = [*tools.compiler, "-Werror", flag, "-fPIC", "-shared", "-o", "nothing.so", "nothing.cpp"]
    return subprocess.run(command, cwd=folder, capture_output=True, timeout=TIMEOUT, check=False).returncode == 0


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Hold a lock between processes, which ends with its holder; without locks each builds, and the last one stays."""
    with path.open("w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
