"""What an export holds loads again, bit for bit; and says where it comes from."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import thresher
from tests.running import CONF, run_eval
from thresher.attention.shared.thresholds import Thresholds
from thresher.run.results import choose_folder
from thresher.tools.export.__main__ import main
from thresher.tools.export.card import write_card


def images() -> torch.Tensor:
    return torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def test_an_export_equals_the_run_bit_for_bit_thresholds_included(trained: Path, exported: Path, plain: Any) -> None:
    state = torch.random.get_rng_state()
    nets = [thresher.load_model(path) for path in (exported, trained, trained / "checkpoints" / "best.ckpt")]
    assert torch.equal(state, torch.random.get_rng_state()), "loading draws from the generator of others"
    wanted = {k.removeprefix("net."): v for k, v in plain["state_dict"].items() if k.startswith("net.")}
    with torch.no_grad():
        outs = [net(images()) for net in nets]
    for net, out in zip(nets, outs, strict=True):
        assert not net.training
        assert torch.equal(out, outs[0])
        assert net.state_dict().keys() == wanted.keys() == load_file(exported / "model.safetensors").keys()
        assert all(torch.equal(value, wanted[name]) for name, value in net.state_dict().items())
    moved = [m.values() for m in nets[0].modules() if isinstance(m, Thresholds)]
    assert len(moved) == 2
    assert all((theta != 6.9).all() for theta in moved), "thresholds of a trained run are not the initial ones"


def test_an_export_is_tested_like_its_checkpoint(trained: Path, exported: Path, tmp_path: Path) -> None:
    ours = ["trainer.limit_test_batches=1"]
    one = run_eval([f"ckpt='{exported}'", *ours, f"run.dir='{tmp_path}/one'"], CONF)
    other = run_eval([f"ckpt='{trained}/checkpoints/best.ckpt'", *ours, f"run.dir='{tmp_path}/other'"], CONF)
    assert one == other
    assert choose_folder(exported, "eval").parent == exported / "eval"


def test_the_card_says_what_it_is_and_what_made_it(trained: Path, exported: Path) -> None:
    text = (exported / "README.md").read_text()
    for part in ("`latte`", "threshold=6.9", "`auto`", "target=0.15", "Ankle boot", "test accuracy", "0.15"):
        assert part in text
    command = next(line for line in text.splitlines() if line.startswith("python train.py"))
    assert "model.embed_dim=16" in command
    assert str(trained) not in text


def test_a_card_shows_strange_names_as_text() -> None:
    node = {"name": "a`b", "arguments": {"x": "`<script>`\x1b[2J"}}
    config = dict.fromkeys(("model", "attention", "compute", "data"), node)
    record = {"version": "1", "config": config, "classes": ["[a](http://b)"], "model_arguments": {}}
    text = write_card("<b>", record, {"test/acc": None, "test/loss": 0.5}, "", {})
    assert "\x1b" not in text
    assert "\\<script\\>" in text
    assert "| test accuracy | - |" in text
    assert "\\[a\\](http" in text


def test_nothing_is_written_over(exported: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (exported / "model.safetensors").read_bytes()
    assert main([f"ckpt='{trained}'", f"run.dir='{exported}'"]) == 1
    assert "is not an empty folder" in capsys.readouterr().err
    assert main([f"ckpt='{trained}'", f"run.dir='{exported}/README.md'"]) == 1
    assert (exported / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ckpt=nowhere"], "there is no checkpoint nowhere"),
        (["nowhere"], "write ckpt=nowhere"),
        (["format=onnx"], "which run?"),
        (["ckpt=a", "formt=onnx"], "did you mean format?"),
        (["ckpt=a", "format=onx"], "Available: safetensors, torch, onnx"),
        (["ckpt=a", "out=x"], "run.dir=x"),
        (["ckpt=."], "neither the folder of a run"),
    ],
)
def test_a_mistake_is_one_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_help_and_mistakes_are_answered_before_torch_is_imported() -> None:
    code = (
        "import sys; from thresher.tools.export.__main__ import main; "
        "assert main(['--help']) == 0 and main(['ckpt=x', 'format=y']) == 1; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_checkpoint_that_says_nothing_of_its_data_is_refused(harmed: Any) -> None:
    path = harmed(lambda c: c["thresher"].pop("model_arguments"))
    with pytest.raises(ValueError, match="does not say what its network must know of its data: refused"):
        thresher.load_model(path)
