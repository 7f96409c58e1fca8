"""The kernels of Triton compile for GPUs that are not there: products on tensor cores, tiles that fit into memory.

What a call would launch is compiled instead. That shows that it compiles, not that it is right or fast.
"""

import re
from typing import Any

import pytest
import torch

from thresher.attention import Pattern
from thresher.attention.blocks import Blocks, BlocksOnGpu
from thresher.attention.latte import Latte, LatteOnGpu
from thresher.kernels.triton import attend, launch, lists
from thresher.testing.inputs import draw, gradients, padded

triton = pytest.importorskip("triton")

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a block of threads may have
PRODUCTS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}  # of tiles of 64
NUMBERS = {"choice": "s8|i8", "forward": "f16|tf32", "backward": "f16|tf32"}  # that are multiplied
POINTERS = {
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}


class Compiler:
    """Compiles each kernel where it would be launched.

    Args:
        capability: Compute capability, 80 for 8.0.
        warps: Number of warps.
        stages: Number of stages of its loops.
        newest: Whether products must be the newest that there are.
    """

    def __init__(self, capability: int, warps: int = 4, stages: int = 2, newest: bool = True) -> None:
        self.products = [PRODUCTS[capability]] if newest else [*PRODUCTS.values()]
        self.capability, self.options = capability, {"num_warps": warps, "num_stages": stages}
        self.compiled: list[str] = []

    def __call__(self, name: str, programs: int, device: torch.device, **arguments: Any) -> None:
        kernel, signature, constants = launch.load_body(name), {}, {}
        for parameter in kernel.params:
            x = arguments.pop(parameter.name)
            if parameter.is_constexpr or x is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", x
            elif isinstance(x, torch.Tensor):
                assert x.is_contiguous(), parameter.name
                signature[parameter.name] = POINTERS[x.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(x, float) else "i32"
        assert not arguments, f"{name} has no {', '.join(arguments)}"
        source = triton.compiler.ASTSource(kernel, signature=signature, constexprs=constants)
        target = triton.backends.compiler.GPUTarget("cuda", self.capability, 32)
        built = triton.compile(source, target=target, options={**self.options, "enable_fp_fusion": False})
        products = "|".join(map(re.escape, self.products))
        numbers = NUMBERS[launch.BODIES[name]]
        assert re.search(rf"({products})\S*[.:]\S*({numbers})", built.asm["ptx"]), f"{name} has no such products"
        assert 0 < built.metadata.shared <= SHARED[self.capability], f"{name} needs {built.metadata.shared} bytes"
        self.compiled.append(name)


def compile_call(
    monkeypatch: pytest.MonkeyPatch,
    compiler: Compiler,
    cls: type[Latte],
    pattern: Pattern,
    dtype: torch.dtype,
    head_dim: int = 40,
    **options: Any,
) -> list[str]:
    """Compile what a call with a gradient would launch; outputs are whatever memory holds."""
    for module in (attend, lists):
        monkeypatch.setattr(module, "launch", compiler)
    for implementation in (BlocksOnGpu, LatteOnGpu):
        monkeypatch.setattr(implementation, "explain_refusal", lambda *_: None)
    mechanism = cls(2, head_dim, pattern, backend="triton", tail="mean", **options)
    inputs = draw(mechanism, lengths=(100, 100), dtype=dtype, groups=1)
    gradients(mechanism, inputs, padded(pattern, lengths=(100, 100)))
    return compiler.compiled


@pytest.mark.parametrize("capability", SHARED)
def test_votes_and_gathered_keys_compile(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_call(monkeypatch, Compiler(capability), Blocks, Pattern.NONCAUSAL_SELF, torch.float16)
    assert compiled == ["describe_rows", "add_votes", "attend_lists", "back_lists"]


@pytest.mark.parametrize("capability", SHARED)
def test_tiles_compile(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_call(monkeypatch, Compiler(capability), Latte, Pattern.CAUSAL_SELF, torch.bfloat16)
    assert compiled == ["describe_rows", "mark_chosen", "attend_lists", "back_lists", "back_tiles"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(16, torch.float16), (128, torch.float32), (256, torch.float32), (256, torch.bfloat16)]
)
def test_heads_of_every_size_compile(
    head_dim: int, dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the most warps and stages that are tuned, in fp32 as torch.set_float32_matmul_precision("high") wants.

    Tiles of less than 64 take older products.
    """
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    compiler = Compiler(capability, warps=max(launch.WARPS), stages=max(launch.STAGES), newest=False)
    assert len(compile_call(monkeypatch, compiler, Latte, Pattern.NONCAUSAL_SELF, dtype, head_dim)) == 5


@pytest.mark.parametrize(
    ("shared", "said"), [(SHARED, "attend_lists has no such products"), ({80: 1024}, "describe_rows needs .* bytes")]
)
def test_products_in_exact_fp32_and_too_large_tiles_are_found(
    shared: dict[int, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact fp32 has no tensor cores; so the two assertions above can fail."""
    monkeypatch.setitem(SHARED, 80, shared[80])
    with pytest.raises(AssertionError, match=said):
        compile_call(monkeypatch, Compiler(80), Latte, Pattern.NONCAUSAL_SELF, torch.float32, 16)


class Recorder(Compiler):
    """Compiles nothing, and keeps how products are rounded."""

    def __call__(self, name: str, programs: int, device: torch.device, **arguments: Any) -> None:
        self.compiled.append(arguments.get("PRECISION", "codes"))


@pytest.mark.parametrize(("precision", "wanted"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_products_in_fp32_are_exact_unless_torch_is_told_otherwise(
    precision: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    found = compile_call(monkeypatch, Recorder(80), Latte, Pattern.NONCAUSAL_SELF, torch.float32)
    assert found == ["codes", "codes", wanted, wanted, wanted]
