"""Networks as programs of torch.export and of ONNX compute what the networks do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import thresher
from thresher.attention import find
from thresher.models.build import language_model
from thresher.tools.export import programs
from thresher.tools.export.run import export

pytestmark = pytest.mark.usefixtures("unchecked_shapes")  # torch.export traces sizes that are no int

WORDS = {"vocabulary": 50, "length": 24, "padding": 0, "objective": "causal"}


def speaker(attention: str, **size: Any) -> Any:
    torch.manual_seed(0)
    return language_model(attention=find(attention), dim=32, depth=1, num_heads=2, ffn_dim=32, **WORDS | size).eval()


def run_onnx(path: Path, *given: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    fed = {x.name: y.numpy() for x, y in zip(session.get_inputs(), given, strict=True)}
    return torch.from_numpy(session.run(None, fed)[0])


def test_a_trained_run_with_thresholds_as_torch_program(trained: Path, tmp_path: Path) -> None:
    folder = export(trained, str(tmp_path / "out"), "torch")
    program = torch.export.load(folder / "model.pt2").module()
    net = thresher.load_model(folder)
    for batch in (1, 3, 7):
        images = torch.randn(batch, 1, 28, 28)
        with torch.no_grad():
            assert_close(program(images), net(images))  # computed by PyTorch, and by kernels
    assert "float32 [batch, 1, 28, 28]" in (folder / "README.md").read_text()


def test_a_trained_run_with_thresholds_as_onnx(trained: Path, tmp_path: Path) -> None:
    folder = export(trained, str(tmp_path / "out"), "onnx")
    net = thresher.load_model(folder)
    for batch in (1, 3):
        images = torch.randn(batch, 1, 28, 28, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            assert torch.allclose(run_onnx(folder / "model.onnx", images), net(images), atol=1e-5)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_top_k_among_equals_keeps_the_same_keys(kind: str, tmp_path: Path) -> None:
    """Repeated tokens at repeated positions have equal scores, and only the order of keys tells them apart."""
    net = speaker("topk")
    with torch.no_grad():
        net.stack.positions.zero_()
        net.stack.blocks[0].attn.v.weight.normal_()
    assert programs.write_program(net, WORDS, tmp_path, kind)
    words = torch.tensor([[3, 4] * 12, [5] * 20 + [0] * 4])
    with torch.no_grad():
        wanted = net(words)
        got = torch.export.load(tmp_path / "model.pt2").module()(words) if kind == "torch" else None
    got = run_onnx(tmp_path / "model.onnx", words) if got is None else got
    assert torch.allclose(got, wanted, atol=1e-5)


def test_two_sequences_become_two_inputs(tmp_path: Path) -> None:
    size = WORDS | {"objective": "denoising"}
    said = programs.write_program(speaker("latte", objective="denoising"), size, tmp_path, "torch")
    assert said["model.pt2"].count("int64 [batch, 24]") == 2


def test_what_draws_random_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Yoso, which draws random numbers"):
        programs.write_program(speaker("yoso"), WORDS, tmp_path, "torch")


def test_a_program_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = speaker("dense")

    def wrong(net: Any, trial: Any, dynamic: Any, path: Path) -> Any:
        path.write_text("x")
        return lambda *given: net(*given) * 1.1

    monkeypatch.setattr(programs, "_write_torch", wrong)
    with pytest.raises(ValueError, match="differ from the network's"):
        programs.write_program(net, WORDS, tmp_path, "torch")
    assert not list(tmp_path.iterdir())


def test_what_the_exporter_cannot_express_is_one_message(tmp_path: Path) -> None:
    class Branching(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="cannot be written as a program"):
        programs.write_program(Branching(), {"image_size": 4, "channels": 1}, tmp_path, "torch")


def test_the_description_is_plain_json(exported: Path) -> None:
    record = json.loads((exported / "config.json").read_text())
    assert record.keys() == {"version", "config", "classes", "model_arguments"}
    assert record["config"]["run"] == {"name": "test"}
