"""The struct of a kernel's function: the same fields in C++ and Python, or an error that names the one that differs."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from thresher.attention.topk import kernel as topk
from thresher.attention.yoso import kernel as yoso
from thresher.kernels import build
from thresher.kernels.build import HEADERS, KernelError, can_use, find_toolchain, load_library
from thresher.kernels.calling import Struct, call
from thresher.kernels.operators import list_input_names, place_gradients

pytestmark = pytest.mark.skipif(not can_use("yoso"), reason="there is no C++ compiler that builds the kernel")

DECLARED = "FIELD(const float*, keys) FIELD(int64_t, n) FIELD(double, scale) FIELD(int64_t, threads)"
PROGRAM = """
#include "arguments.h"
using namespace thresher;
{before}
#define DECLARED(FIELD) {declared}
#define LISTED(FIELD) {listed}
struct Arguments {{
    DECLARED(THRESHER_MEMBER)
    template <class Visit>
    void visit_fields(Visit& visit) const {{ LISTED(THRESHER_VISIT) }}
}};
template <class> using ArgumentsOf = Arguments;
namespace {{ void fields(const Arguments&) {{}} }}
THRESHER_EXPORT(fields, ArgumentsOf, float, float32)
"""


def compile_source(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "fields.cpp").write_text(source)
    command = [
        *find_toolchain().compiler,
        "-std=c++17",
        "-fPIC",
        "-shared",
        f"-I{HEADERS}",
        "-o",
        "fields.so",
        "fields.cpp",
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def describe_in_cpp(folder: Path, listed: str, declared: str = DECLARED, before: str = "") -> str:
    """Return the description of a struct whose listed fields need not be those that it declares."""
    done = compile_source(PROGRAM.format(before=before, declared=declared, listed=listed), folder)
    assert done.returncode == 0, done.stderr
    describe = ctypes.CDLL(str(folder / "fields.so")).describe_fields_float32
    describe.restype = ctypes.c_char_p
    description: bytes = describe()
    return description.decode()


def test_fields_lie_where_cpp_puts_them(tmp_path: Path) -> None:
    struct = Struct("kernel: attend_float32", describe_in_cpp(tmp_path, DECLARED))
    keys = torch.arange(3.0)
    filled = struct.fill({"threads": 2, "scale": 0.5, "keys": keys, "n": 3})
    assert [getattr(filled, name) for name in ("keys", "n", "scale", "threads")] == [keys.data_ptr(), 3, 0.5, 2]
    assert ctypes.string_at(ctypes.byref(filled), 8) == keys.data_ptr().to_bytes(8, "little")
    assert struct.fill({"keys": None, "n": True, "scale": 1, "threads": 2}).keys is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("FIELD(int64_t, n) FIELD(double, scale)", "FIELD(double, scale) FIELD(int64_t, n)"), "the field scale has 8"),
        (("FIELD(const float*, keys) ", ""), "the field n has 8 bytes at byte 8 in C.., but 8 bytes at byte 0"),
        (("FIELD(double, scale) ", ""), "the field threads has 8 bytes at byte 24 in C.., but 8 bytes at byte 16"),
        ((" FIELD(int64_t, threads)", ""), "has 32 bytes in C.., but its listed fields, the last of which is scale"),
    ],
    ids=["order", "first", "middle", "last"],
)
def test_a_list_that_is_not_the_struct_is_refused(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    assert change[0] in DECLARED
    with pytest.raises(KernelError, match=f"kernel: attend_float32: .*{message}"):
        Struct("kernel: attend_float32", describe_in_cpp(tmp_path, DECLARED.replace(*change)))


def test_a_field_of_another_size_is_refused(tmp_path: Path) -> None:
    declared = DECLARED.replace("int64_t, n", "int32_t, n")
    source = PROGRAM.format(before="", declared=declared, listed=declared)
    assert "Python knows no such type of a field" in compile_source(source, tmp_path).stderr
    lie = 'namespace thresher { template <> inline constexpr const char* KIND<int32_t> = "int64"; }'
    with pytest.raises(KernelError, match=r"the field n has 4 bytes at byte 8 in C.., but 8 bytes at byte 8"):
        Struct("kernel: attend_float32", describe_in_cpp(tmp_path, declared, declared, lie))


def test_a_type_that_python_does_not_know_is_refused() -> None:
    with pytest.raises(KernelError, match="the field n has the type int32; known are int64, float64, bool"):
        Struct("kernel: attend_float32", "n int32 0 4\n4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bits": ...},
            "no value for the field bits .the fields are projections, codes, tokens, hashes, bits, threads",
        ),
        ({"width": 3}, "no field for the value width"),
        (
            {"projections": torch.zeros(4, 6).double()},
            "the field projections holds a contiguous tensor of float32, not",
        ),
        ({"projections": torch.zeros(6, 4).mT}, "not a tensor of float32, not contiguous"),
        ({"projections": 3}, "the field projections holds a contiguous tensor of float32, not 3"),
        ({"codes": torch.zeros(2, 4, dtype=torch.int32)}, "the field codes holds a contiguous tensor of int16, not a"),
        ({"bits": 3.0}, r"the field bits holds a number .int64., not 3\.0"),
        ({"bits": None}, "the field bits holds a number .int64., not None"),
        ({"bits": torch.tensor(3)}, "the field bits holds a number .int64., not a tensor of int64"),
    ],
    ids=["missing", "unknown", "type", "strides", "number", "elements", "fraction", "nothing", "tensor"],
)
def test_a_value_that_does_not_fit_its_field_is_refused(change: dict[str, object], message: str) -> None:
    codes = torch.zeros(2, 4, dtype=torch.int16)
    fields = {"projections": torch.ones(4, 6), "codes": codes, "tokens": 4, "hashes": 2, "bits": 3} | change
    with pytest.raises(KernelError, match=f"yoso: pack_float32: .*{message}"):
        call("yoso", "pack", torch.float32, **{k: x for k, x in fields.items() if x is not ...})  # type: ignore[arg-type]
    assert not codes.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_function_that_a_library_lacks_is_named(dtype: torch.dtype) -> None:
    name = f"pack_.*{str(dtype).removeprefix('torch.')}"
    with pytest.raises(KernelError, match=rf"the kernel yoso has no function {name}: export it in yoso\.cpp"):
        call("yoso", "pack", dtype)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A copy of YOSO's kernel that may be changed, and an empty cache."""
    copy = tmp_path / "attention" / "yoso" / "csrc"
    shutil.copytree(build.find_source("yoso").parent, copy)
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    monkeypatch.setattr(build, "_failures", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("THRESHER_CXXFLAGS", "-O0")
    load_library.cache_clear()
    yield copy / "yoso.cpp"
    load_library.cache_clear()


def test_a_field_that_only_cpp_has_is_named(package: Path) -> None:
    source = package.read_text()
    line = "    FIELD(int64_t, bits) "
    assert line in source
    package.write_text(source.replace(line, f"    FIELD(int64_t, seed){line}", 1))
    with pytest.raises(KernelError, match="yoso: pack_float32: no value for the field seed"):
        yoso.pack(torch.ones(4, 6), 3)


def test_the_order_of_fields_is_that_of_cpp_alone(package: Path) -> None:
    y = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    wanted = yoso.pack(y, 3)
    source = package.read_text()
    first, second = "FIELD(int64_t, tokens)", "FIELD(int64_t, bits)  "
    assert source.index(first) < source.index(second)
    package.write_text(source.replace(first, "MARK", 1).replace(second, first, 1).replace("MARK", second, 1))
    load_library.cache_clear()
    assert torch.equal(yoso.pack(y, 3), wanted)
    assert wanted.unique().numel() > 4


def test_a_gradient_of_no_input_is_refused() -> None:
    names = list_input_names(topk.attend)
    assert place_gradients(topk.attend, {}, q=torch.ones(1))[1:] == (None,) * (len(names) - 1)
    with pytest.raises(ValueError, match="has no input query; its inputs are q, k, v, scale, seen, limit, most, shift"):
        place_gradients(topk.attend, {}, query=torch.ones(1))
