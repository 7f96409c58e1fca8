"""The command: what it says of a machine, what it fails at, and how it answers mistakes."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import warm
from tests.running import CONF
from thresher.attention import Attended, Call, Mechanism, Pattern, available
from thresher.attention.topk.mechanism import TopK
from thresher.kernels.build import KernelError
from thresher.testing.inputs import attend, draw
from thresher.tools.doctor import backends, machine
from thresher.tools.doctor.command import doctor

ROOT = CONF.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}


class Kernelled(TopK):
    """Top-k with a kernel that does what it should, or is wrong somewhere."""

    quirk = "right"

    def __init__(
        self, num_heads: int, head_dim: int, pattern: Pattern, *, keys: int = 8, backend: str = "reference"
    ) -> None:
        super().__init__(num_heads, head_dim, pattern, keys=keys, backend="reference")
        self.is_kernel = backend == "cpu"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        quirk = self.quirk if self.is_kernel else "right"
        out, cost, _ = Mechanism.forward(self, q, k.detach() + 0 * k if quirk == "deaf" else k, v, call)
        if quirk == "weak" or (quirk == "weak in evaluation" and not self.training):
            out = out * 0.98
        if quirk == "greedy":
            cost = cost._replace(kept=cost.kept * 1.5)
        return Attended(out * torch.nan if quirk == "nan" else out, cost)


def _attend(mechanism: Kernelled, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
    return mechanism.attend(q, k, v, call)


Kernelled.forward = _attend  # which no class body may define: it goes around the template


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise KernelError("there is no C++ compiler")

    monkeypatch.setattr("thresher.attention.backends.load_library", refuse)


def test_a_machine_without_a_compiler_is_well_unless_kernels_are_required(
    no_compiler: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(CONF, []) == 0
    assert "there is no C++ compiler" in " ".join(capsys.readouterr().out.split())
    assert doctor(CONF, ["require=[cpu]", f"run.dir='{tmp_path}/new'"]) == 1
    assert "failed: require=cpu: the kernel of blocks is off" in capsys.readouterr().out
    report = json.loads((tmp_path / "new" / "doctor.json").read_text())
    assert [row["mechanism"] for row in report["backends"]] == available()
    assert {row["mechanism"] for row in report["backends"] if row["kernel"] == "off"} == {
        "blocks",
        "latte",
        "mca",
        "smyrf",
        "topk",
        "yoso",
    }
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize(
    ("quirk", "said"),
    [
        ("right", "differs from PyTorch's output by 0e+00"),
        ("weak", "its kernel's output is off the reference's by 2.0e-02"),
        ("weak in evaluation", "its kernel's output is off the reference's by 2.0e-02"),
        ("greedy", "its kernel keeps 0.0938 of the pairs, its reference 0.0625"),
        ("deaf", "its kernel's gradient of k is off"),
        ("nan", "its kernel's output is off the reference's by nan"),
    ],
)
def test_a_kernel_that_computes_something_else_fails(
    quirk: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Kernelled, "quirk", quirk)
    monkeypatch.setattr(backends, "TOKENS", 128)
    monkeypatch.setattr(backends, "available", lambda: ["kernelled"])
    monkeypatch.setattr(backends, "find", lambda name: Kernelled)
    assert doctor(CONF, ["json=true"]) == int(quirk != "right")
    report = json.loads(capsys.readouterr().out)
    (row,) = report["backends"]
    assert row["kernel"] == ("on" if quirk == "right" else "wrong")
    assert said in row["why"]
    assert (report["failed"] == []) == (quirk == "right")


def test_kernels_are_compared_where_pairs_are_dropped() -> None:
    rows = {row["mechanism"]: row for row in backends.try_backends()}
    assert rows["dense"]["kernel"] == "none"
    assert all(rows[name]["kernel"] in ("on", "off") for name in ("latte", "smyrf", "topk", "yoso")), rows
    latte = backends.build_seeded(backends.find("latte"), Pattern.NONCAUSAL_SELF, "reference")
    cost = attend(latte, draw(latte, lengths=(128, 128), dtype=torch.float32)).cost
    assert float(cost.kept.detach().sum() / cost.visible.sum()) < 0.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and its kernels are tried")
def test_kernels_for_gpus_are_listed_with_what_is_known_of_them(
    no_compiler: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "available", lambda: ["blocks", "dense", "latte"])
    rows = {row["mechanism"]: row for row in backends.try_backends()}
    assert {name: row["triton"] for name, row in rows.items()} == {"blocks": "off", "dense": "none", "latte": "off"}
    assert rows["latte"]["triton_why"] == machine.explain_missing_cuda()
    assert doctor(CONF, []) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "No GPU has run them" in said
    wrong = [row | {"triton": "wrong", "triton_why": "its output is off"} for row in rows.values()]
    monkeypatch.setattr(backends, "try_backends", lambda: wrong)
    assert doctor(CONF, []) == 1
    assert "failed: backend=triton of latte: its output is off" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so that requiring one does not fail")
def test_what_is_required_and_missing_fails(no_compiler: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(CONF, ["require=[cuda]"]) == 1
    assert "failed: require=cuda: off: " in capsys.readouterr().out


def test_json_alone_is_nothing_but_json_and_a_leak_is_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(CONF, ["network=tests.tools.doctor.models:encoder", "mechanisms=[latte,topk]", "json=true"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["mechanism"] for row in report["masks"]] == ["as it is", "latte", "topk"]
    assert report["failed"] == []
    assert doctor(CONF, ["network=tests.tools.doctor.models:shows_padding", "json=true"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["failed"][0].startswith("as it is leaks padding (outputs move by ")


def test_settings_are_hyperparameters(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["network=tests.tools.doctor.models:encoder", "mechanisms=topk", "settings.topk.keys=2", "json=true"]
    doctor(CONF, arguments)
    kept = json.loads(capsys.readouterr().out)["masks"][1]["kept"]
    assert 2 / 40 <= kept <= 2 / 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["netwrok=bert"], "netwrok"),
        (["network=deit_tiny_patch16_223"], "did you mean deit_tiny_patch16_224"),
        (["network=timm:deit_tiny_patch16_223"], "did you mean deit_tiny_patch16_224"),
        (["mechanisms=topk"], "name it by network="),
        (["network=bert", "mechanisms=lattte"], "did you mean 'latte'"),
        (["settings.topk.keyz=2"], "did you mean keys"),
        (["require=[gpu]"], "require"),
        (["tokens=1"], "tokens"),
        (["network=tests.tools.doctor.models:nothing"], "nothing"),
        (["network=tests.tools.doctor.models:without_inputs"], "must return a torch.nn.Module and example inputs"),
        (["network=tests.tools.doctor.models:shows_padding", "mechanisms=topk"], "holds mechanisms already"),
    ],
)
def test_a_mistake_is_told(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "describe_machine", dict)
    monkeypatch.setattr(backends, "try_backends", list)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        doctor(CONF, arguments)


def test_a_shell_sees_one_message_and_an_exit_code(tmp_path: Path) -> None:
    def call(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return warm.run(["-m", "thresher.doctor", *arguments], cwd, ENVIRONMENT)

    assert "python -m thresher.doctor network=" in call("--help", cwd=tmp_path).stdout
    mistake = call("requires=[cpu]")
    assert mistake.returncode == 1
    assert mistake.stderr.startswith("error: ")
    assert "Traceback" not in mistake.stderr
