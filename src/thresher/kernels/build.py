"""Build C++ sources into shared libraries on the machine that runs them, on first use.

A library has a plain C interface and includes the C++ standard library only, so it builds in seconds and works with
every version of Python and torch. It is built for the local processor (`-march=native`) and stored in the user's cache
under a hash of sources, flags, compiler and processor; any change leads to a new library. If several processes start at
once, one of them builds, in a temporary folder, and moves the result into place.
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

PACKAGE = Path(__file__).parents[1]
HEADERS = Path(__file__).parent / "csrc"  # shared by all kernels
EXTRA_FLAGS = "THRESHER_CXXFLAGS"  # environment variable with extra flags, for sanitizers and other processors
REQUIRED = ("-std=c++17", "-O3", "-fPIC", "-pthread")
OPTIONAL = ("-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi")
TIMEOUT = 600  # seconds that one build may take


class KernelError(RuntimeError):
    """A kernel cannot be built or loaded here; the message says why."""


class Toolchain(NamedTuple):
    """A compiler with its version and extra flags.

    Attributes:
        compiler: Words of the command.
        version: First line of its `--version`.
        extra: Flags from the environment.
    """

    compiler: tuple[str, ...]
    version: str
    extra: tuple[str, ...]


def find_toolchain() -> Toolchain:
    """Find the compiler: the one in `CXX`, or the first of c++, g++ and clang++.

    Raises:
        KernelError: There is no compiler, or it does not run.
    """
    named = os.environ.get("CXX")
    compiler = shlex.split(named) if named else [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
    if not compiler or not shutil.which(compiler[0]):
        missing = f"CXX={named} does not exist" if named else "there is no C++ compiler (c++, g++, clang++)"
        raise KernelError(f"{missing}; install one, or name it in the environment variable CXX")
    try:
        printed = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelError(f"{shlex.join(compiler)} --version fails: {error}") from error
    version = printed.stdout.partition("\n")[0]
    return Toolchain(tuple(compiler), version, tuple(shlex.split(os.environ.get(EXTRA_FLAGS, ""))))


def find_cache_folder() -> Path:
    """Find the folder of libraries: `$XDG_CACHE_HOME/thresher/kernels`, or `~/.cache/thresher/kernels`.

    Raises:
        KernelError: The user has no home directory.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "thresher" / "kernels"
    except RuntimeError as error:
        raise KernelError(f"there is no folder for built kernels ({error}); set XDG_CACHE_HOME") from error


@functools.cache
def load_library(name: str) -> ctypes.CDLL:
    """Load the library of a kernel; build it first if the cache has none.

    Raises:
        KernelError: The library does not build or load. This process does not try again.
    """
    if name not in _failures:
        try:
            return _load(name)
        except (KernelError, OSError, subprocess.SubprocessError) as error:
            _failures[name] = f"{name}: {error}"
    raise KernelError(_failures[name])


_failures: dict[str, str] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def can_use(name: str) -> bool:
    """Check whether a kernel builds and loads; the first failure in a process gives a warning."""
    first = not _failures
    try:
        load_library(name)
    except KernelError as error:
        if first:
            warnings.warn(
                f"the CPU kernels are off, attention runs on PyTorch instead: {error} "
                "(attention.backend=reference avoids this warning)",
                RuntimeWarning,
                stacklevel=2,
            )
        return False
    return True


def _load(name: str) -> ctypes.CDLL:
    tools = find_toolchain()
    path = find_cache_folder() / f"{name}-{hash_inputs(name, tools)}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock")):
            if not path.is_file():
                _build(name, tools, path)
    return ctypes.CDLL(str(path))


def hash_inputs(name: str, tools: Toolchain) -> str:
    """Hash all that a build of a kernel depends on: compiler, flags and sources."""
    text = [
        *tools.compiler,
        tools.version,
        *REQUIRED,
        *OPTIONAL,
        *tools.extra,
        platform.machine(),
        _describe_processor(),
    ]
    digest = hashlib.sha256("\0".join(text).encode())
    source = find_source(name)
    for each in (source, *sorted(source.parent.glob("*.h")), *sorted(HEADERS.glob("*.h"))):
        digest.update(each.read_bytes())
    return digest.hexdigest()[:20]


def find_source(name: str) -> Path:
    """Find the C++ file of a kernel, in the folder of its mechanism."""
    return PACKAGE / "attention" / name / "csrc" / f"{name}.cpp"


def _describe_processor() -> str:
    """Describe what `-march=native` depends on; machines with different processors may share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    words = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa")
    return "\n".join(sorted({line for line in lines if line.partition("\t")[0].strip() in words}))


def _build(name: str, tools: Toolchain, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=path.parent) as folder:
        built = Path(folder) / path.name
        flags = (*REQUIRED, *(f for f in OPTIONAL if _accepts_flag(tools, f, Path(folder))), *tools.extra)
        command = [*tools.compiler, *flags, "-shared", f"-I{HEADERS}", "-o", str(built), str(find_source(name))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        if done.returncode or not built.is_file():
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise KernelError(f"{shlex.join(command)} fails: {' '.join(lines[:3]) or done.returncode}")
        os.replace(built, path)


def _accepts_flag(tools: Toolchain, flag: str, folder: Path) -> bool:
    """Check, with an empty program, whether a compiler accepts an optional flag."""
    (folder / "nothing.cpp").write_text("int nothing() { return 0; }\n")
    command = [*tools.compiler, "-Werror", flag, "-fPIC", "-shared", "-o", "nothing.so", "nothing.cpp"]
    return subprocess.run(command, cwd=folder, capture_output=True, timeout=TIMEOUT, check=False).returncode == 0


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock between processes; where files have no locks, every process builds and the last result stays."""
    with path.open("w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
