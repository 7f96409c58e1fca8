"""What the kernels of Triton cannot compute is refused by name; tuning needs no device before a call."""

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from thresher.attention import Call, Pattern
from thresher.attention.blocks import Blocks
from thresher.attention.latte import Latte
from thresher.kernels.triton import launch
from thresher.testing.inputs import attend, draw

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def forget() -> Any:
    """Look for triton again in each test, and forget what it found."""
    found = (launch.explain_missing_triton, launch.interprets, launch._explain_device)
    for each in found:
        each.cache_clear()
    yield
    for each in found:
        each.cache_clear()


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)


def test_calls_on_cpus_are_refused_with_a_backend_that_can() -> None:
    for cls, others in ((Blocks, "gather or reference compute"), (Latte, "reference computes")):
        mechanism = cls(2, 8, Pattern.NONCAUSAL_SELF, backend="triton").double()
        with pytest.raises(ValueError, match=f"backend=triton cannot .* tensors are on cpu; backend={others} it"):
            attend(mechanism, draw(mechanism))
        mechanism.backend = "auto"
        attend(mechanism, draw(mechanism))


@pytest.mark.parametrize(("error", "said"), [(None, "pip install triton"), (RuntimeError("no libcuda"), "no libcuda")])
def test_a_missing_and_a_broken_triton_are_refused(
    error: Exception | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_a_gpu(monkeypatch)
    whole = importlib.import_module

    def break_it(name: str) -> ModuleType:
        if name.startswith("triton"):
            raise ImportError("No module named 'triton'") if error is None else error
        return whole(name)

    monkeypatch.setattr(importlib, "import_module", break_it)
    assert said in str(launch.explain_unusable(CUDA, {torch.float32}, (8, 8)))
    assert "are on cpu" in str(launch.explain_unusable(CPU, {torch.float32}, (8, 8)))


def test_only_bodies_import_triton() -> None:
    """So thresher works where triton is missing; `launch` imports bodies by name."""
    folder = Path(launch.__file__).parents[2]
    importing = [path for path in folder.rglob("*.py") if re.search("^(import|from) triton", path.read_text(), re.M)]
    bodies = {f"thresher.kernels.triton.{name}" for name in (*launch.BODIES.values(), "pieces")}
    assert {".".join(("thresher", *path.relative_to(folder).with_suffix("").parts)) for path in importing} == bodies
    for path in set(folder.rglob("*.py")) - set(importing):
        assert not any(f"import {name}" in path.read_text() or f"from {name}" in path.read_text() for name in bodies)


@pytest.mark.parametrize(
    ("dtype", "widths", "capability", "said"),
    [
        (torch.float64, (8, 8), (9, 0), "torch.float64"),
        (torch.float32, (8, 257), (9, 0), "at most 256 dimensions, and these have 257"),
        (torch.float32, (8, 8), (7, 5), "needs compute capability 8.0, and this GPU has 7.5"),
    ],
)
def test_what_no_kernel_serves_is_refused(
    dtype: torch.dtype, widths: tuple[int, int], capability: tuple[int, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    pretend_a_gpu(monkeypatch, capability)
    assert said in str(launch.explain_unusable(CUDA, {dtype}, widths))
    pretend_a_gpu(monkeypatch)
    launch._explain_device.cache_clear()
    assert launch.explain_unusable(CUDA, {torch.bfloat16, torch.float32}, (256, 20)) is None


@pytest.mark.parametrize(
    ("options", "call", "said"),
    [
        ({}, Call(bias=torch.zeros(1, 2, 7, 7)), "no masks of pairs and no biases; backend=reference computes it"),
        ({"estimate": {"bits": "exact"}}, Call(), "estimates from codes .*; backend=gather or reference compute it"),
        ({"gate": {"surrogate": "compact"}}, Call(), r"gate\.surrogate=inside"),
        ({"gate": {"into_scores": True}}, Call(), r"gate\.into_scores=false"),
    ],
)
def test_options_without_a_kernel_are_refused(
    options: dict[str, Any], call: Call, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thresher.attention.latte.gpu.explain_unusable", lambda *_: None)
    mechanism = Blocks(2, 8, Pattern.NONCAUSAL_SELF, backend="triton", **options)
    with pytest.raises(ValueError, match=said):
        attend(mechanism, draw(mechanism, dtype=torch.float32), call)


def test_gradients_without_a_fixed_order_are_refused_where_torch_wants_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thresher.attention.latte.gpu.explain_unusable", lambda *_: None)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    mechanism = Blocks(2, 8, Pattern.NONCAUSAL_SELF, backend="triton")
    with pytest.raises(ValueError, match="no fixed order"):
        attend(mechanism, draw(mechanism, dtype=torch.float32))


def test_the_interpreter_is_not_chosen_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thresher.attention.latte.gpu.explain_unusable", lambda *_: None)
    mechanism = Latte(2, 8, Pattern.NONCAUSAL_SELF)
    inputs = draw(mechanism, dtype=torch.float32)
    x = mechanism.prepare(inputs.q, inputs.k, inputs.v, Call())
    (ours,) = (each for each in Latte.implementations if each.backend == "triton")
    assert "set backend=triton" in str(ours.explain_refusal(mechanism, x))


@pytest.mark.parametrize("name", launch.BODIES)
def test_tuning_is_set_up_without_a_driver(name: str) -> None:
    pytest.importorskip("triton")
    tuned = launch.tune(name)
    assert len(tuned.configs) == len(launch.WARPS) * len(launch.STAGES)
    assert set(tuned.keys) <= set(tuned.arg_names)
    assert all(constant.isupper() for constant in tuned.keys)
    assert tuned.reset_to_zero == (["grad_k", "grad_v"] if name.startswith("back") else []), "it runs many times"
