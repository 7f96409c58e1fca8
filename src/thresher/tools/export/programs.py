"""A network as a program that does not need this package, of torch.export or ONNX, compared before it is kept."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thresher.attention.mechanism import Mechanism

BATCHES = (1, 2, 5)  # examples in the calls that are compared
TOLERANCE = 1e-2  # relative to the largest output: rounding may move a key across its threshold


def write_program(net: nn.Module, arguments: Mapping[str, Any], folder: Path, kind: str) -> dict[str, str]:
    """Write a network as a program; return its file and a description.

    Args:
        net: In evaluation mode.
        arguments: Arguments that the network was built with for its data; they determine its inputs.
        folder: Where to write.
        kind: "torch" or "onnx".

    Raises:
        ValueError: Its attention draws random numbers, the exporter cannot express it, or outputs differ.
        ImportError: ONNX is not installed.
    """
    for name, module in net.named_modules():
        if isinstance(module, Mechanism) and module.stochastic:
            raise ValueError(
                f"{name} is {type(module).__name__}, which draws random numbers: only attention whose sparsity is "
                "fixed becomes a program (latte, topk, dense, mean, none); format=safetensors has no such limit"
            )
    trial = draw_inputs(arguments, 2)
    batch = torch.export.Dim("batch", min=1, max=2**16)
    dynamic = tuple({0: batch} for _ in trial)
    path, write = (folder / "model.pt2", _write_torch) if kind == "torch" else (folder / "model.onnx", _write_onnx)
    try:
        with torch.no_grad(), _without_kernels(net), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = write(net, trial, dynamic, path)
            error = max(_measure_error(net, run, draw_inputs(arguments, size)) for size in BATCHES)
    except ImportError:
        raise
    except Exception as reason:  # the exporters raise what they like
        path.unlink(missing_ok=True)
        raise ValueError(f"this network cannot be written as a program: {str(reason).splitlines()[0]}") from reason
    if not error <= TOLERANCE:
        path.unlink()
        raise ValueError(
            f"the outputs of {path.name} differ from the network's by {error:.1e} of the largest: not kept"
        )
    how = "`torch.export.load`" if kind == "torch" else "any runtime of ONNX"
    shapes = ", ".join(
        f"{str(x.dtype).removeprefix('torch.')} [batch, {', '.join(map(str, x.shape[1:]))}]" for x in trial
    )
    return {path.name: f"for {how}: {shapes}; outputs within {error:.1e} of the network's, relative to the largest"}


@contextmanager
def _without_kernels(net: nn.Module) -> Iterator[None]:
    """Switch every mechanism to its reference, in PyTorch, while it is entered."""
    chosen: dict[Any, Any] = {m: m.backend for m in net.modules() if isinstance(m, Mechanism) and hasattr(m, "backend")}
    for mechanism in chosen:
        mechanism.backend = "reference"
    try:
        yield
    finally:
        for mechanism, backend in chosen.items():
            mechanism.backend = backend


def draw_inputs(arguments: Mapping[str, Any], batch: int) -> tuple[Tensor, ...]:
    """Draw inputs of the kind that a network was built for: images, token ids, or ids of two sequences."""
    rng = torch.Generator().manual_seed(batch)
    if "image_size" in arguments:
        size = arguments["image_size"]
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return (torch.randn(batch, arguments["channels"], *sides, generator=rng),)
    length = arguments["length"]
    tokens = torch.randint(1, arguments["vocabulary"], (batch, length), generator=rng)
    tokens[-1, length * 3 // 4 :] = arguments.get("padding", 0)
    if arguments.get("objective") != "denoising":
        return (tokens,)
    return tokens, torch.randint(1, arguments["vocabulary"], (batch, length), generator=rng)


def _write_torch(net: nn.Module, trial: tuple[Tensor, ...], dynamic: Any, path: Path) -> Callable[..., Tensor]:
    torch.export.save(torch.export.export(net, trial, dynamic_shapes=dynamic, strict=False), path)
    program: Callable[..., Tensor] = torch.export.load(path).module()
    return program


def _write_onnx(net: nn.Module, trial: tuple[Tensor, ...], dynamic: Any, path: Path) -> Callable[..., Tensor]:
    import onnxruntime
    from onnxscript import opset18 as op

    def stable_sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        # TopK puts the lower index first among equals.
        return op.TopK(x, op.Shape(x, start=dim), axis=dim, largest=int(descending), sorted=1)

    program = torch.onnx.export(
        torch.export.export(net, trial, dynamic_shapes=dynamic, strict=False),
        dynamo=True,
        verbose=False,
        custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
    )
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()]

    def run(*given: Tensor) -> Tensor:
        fed = dict(zip(names, (x.numpy() for x in given), strict=True))
        return torch.from_numpy(session.run(None, fed)[0])

    return run


def _measure_error(net: nn.Module, run: Callable[..., Tensor], given: tuple[Tensor, ...]) -> float:
    wanted, got = net(*given), run(*given)
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
