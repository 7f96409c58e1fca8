"""Kernels where there is no compiler, a broken or an odd one, or where several processes want one library at once."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from thresher.attention import Call, Pattern
from thresher.attention.topk.mechanism import TopK
from thresher.kernels import build
from thresher.kernels.build import KernelError, can_use, load_library
from thresher.testing.inputs import attend, draw

CXX = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
COMPILER = pytest.mark.skipif(CXX is None, reason="there is no C++ compiler")
Make = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _as_new(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process that has loaded nothing, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("THRESHER_CXXFLAGS", "-O0")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "_failures", {})
    load_library.cache_clear()
    yield
    load_library.cache_clear()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """Make CXX a script: it notes what it compiles, then runs some lines of shell, then the real compiler."""

    def make(lines: str) -> Path:
        script = tmp_path / "compiler"
        noted = f'case "$*" in *csrc*) echo "$*" >> {tmp_path}/calls;; esac'
        script.write_text(f'#!/bin/sh\n{noted}\n{lines}\nexec {CXX} "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return tmp_path / "calls"

    return make


def outputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Return what top-k computes where it may choose, and what PyTorch computes."""
    auto, plain = (TopK(2, 16, Pattern.NONCAUSAL_SELF, keys=5, backend=b) for b in ("auto", "reference"))
    inputs = draw(auto, lengths=(40, 40))
    return attend(auto, inputs, Call()).out, attend(plain, inputs, Call()).out


def assert_off(message: str) -> None:
    """The kernel is off for this reason: one warning, PyTorch in its place, an error where it was asked for."""
    with pytest.warns(RuntimeWarning, match="the CPU kernels are off, attention runs on PyTorch instead") as told:
        got, wanted = outputs()
    assert torch.equal(got, wanted)
    assert len(told) == 1
    assert message in str(told[0].message)
    assert "backend=reference avoids this warning" in str(told[0].message)
    assert torch.equal(*outputs())  # with warnings as errors, so none comes again
    refusal = "backend=cpu needs a kernel that does not build here; backend=auto needs none"
    with pytest.raises(ValueError, match=refusal):
        TopK(2, 16, Pattern.NONCAUSAL_SELF, keys=5, backend="cpu")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_off("there is no C++ compiler (c++, g++, clang++); install one, or name it in the environment variable CXX")


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    assert_off("CXX=/nowhere/g++ -m64 does not exist")


def test_a_compiler_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    assert_off("false --version fails")


@COMPILER
def test_a_build_that_fails_is_told_once_and_not_tried_again(compiler: Make) -> None:
    calls = compiler('case "$*" in *topk.cpp*) echo "topk.cpp:1: error: no such thing" >&2; exit 1;; esac')
    assert_off("topk.cpp:1: error: no such thing")
    assert not can_use("topk")
    assert len(calls.read_text().splitlines()) == 1


@COMPILER
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert_off("/proc/nowhere")


@COMPILER
def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert_off("there is no folder for built kernels")


@COMPILER
def test_a_library_that_is_damaged() -> None:
    path = build.find_cache_folder() / f"topk-{build.hash_inputs('topk', build.find_toolchain())}.so"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF")
    assert_off(str(path))


@COMPILER
def test_flags_that_a_compiler_does_not_know_are_left_out(compiler: Make) -> None:
    """As on Arm, or with a compiler that has no OpenMP: the portable code, and the same results."""
    calls = compiler('case "$*" in *-march=native*|*-fopenmp*) echo "error: unknown option" >&2; exit 1;; esac')
    got, wanted = outputs()
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert "-march=native" not in calls.read_text()
    assert "-fno-math-errno" in calls.read_text()


@COMPILER
def test_one_of_several_processes_builds_and_a_library_is_built_once(compiler: Make, tmp_path: Path) -> None:
    calls = compiler("")
    command = [
        sys.executable,
        "-c",
        "from thresher.kernels.build import load_library; print(load_library('topk')._name)",
    ]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({child.communicate(timeout=300)[0] for child in children}) == 1
    assert [child.returncode for child in children] == [0] * 3
    load_library("topk")
    assert len(calls.read_text().splitlines()) == 1
    assert [path.suffix for path in (tmp_path / "cache").rglob("topk-*")].count(".so") == 1


@COMPILER
@pytest.mark.parametrize("change", ["flags", "compiler", "source", "processor"])
def test_what_a_library_was_built_with_is_in_its_name(
    change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = build.hash_inputs("topk", build.find_toolchain())
    assert before == build.hash_inputs("topk", build.find_toolchain())
    if change == "flags":
        monkeypatch.setenv("THRESHER_CXXFLAGS", "-O1")
    elif change == "compiler":
        script = tmp_path / "other"
        script.write_text("#!/bin/sh\necho other 1.0\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
    elif change == "source":
        shutil.copytree(build.HEADERS, tmp_path / "csrc")
        with (tmp_path / "csrc" / "softmax.h").open("a") as file:
            file.write("// another line\n")
        monkeypatch.setattr(build, "HEADERS", tmp_path / "csrc")
    else:
        monkeypatch.setattr(build, "_describe_processor", lambda: "model name: another")
    assert build.hash_inputs("topk", build.find_toolchain()) != before


@COMPILER
def test_what_a_kernel_cannot_serve_is_told_where_it_was_asked_for() -> None:
    mechanism = TopK(2, 16, Pattern.NONCAUSAL_SELF, keys=5, backend="cpu")
    q = torch.zeros(1, 2, 4, 16)
    with pytest.raises(
        ValueError,
        match=r"backend=cpu cannot compute this call of TopK: some of its tensors are torch.float64, others are not",
    ):
        mechanism(q, q.double(), q, Call())


@COMPILER
def test_failures_name_the_kernel() -> None:
    with pytest.raises(KernelError, match=r"nothing: .*nothing\.cpp"):
        load_library("nothing")
