"""The command: what it says of a machine, what it fails at, and how it answers mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.running import CONF
from thresher.attention import available
from thresher.doctor import backends, machine
from thresher.doctor.command import doctor
from thresher.kernels.build import KernelError

ROOT = CONF.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise KernelError("there is no C++ compiler")

    monkeypatch.setattr("thresher.attention.backends.library", refuse)


def test_a_machine_without_a_compiler_is_well_unless_kernels_are_required(
    no_compiler: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(CONF, []) == 0
    assert "there is no C++ compiler" in " ".join(capsys.readouterr().out.split())
    assert doctor(CONF, ["require=[cpu]", f"json='{tmp_path}/new/doctor.json'"]) == 1
    assert "failed: require=cpu: the kernel of latte is off" in capsys.readouterr().out
    report = json.loads((tmp_path / "new" / "doctor.json").read_text())
    assert [row["mechanism"] for row in report["backends"]] == available()
    assert {row["mechanism"] for row in report["backends"] if row["kernel"] == "off"} == {
        "latte",
        "mca",
        "smyrf",
        "topk",
        "yoso",
    }
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_a_kernel_that_computes_something_else_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "_distance", lambda one, other: float("nan"))
    assert {row["kernel"] for row in backends.backends()} <= {"wrong", "off", "none"}
    assert doctor(CONF, []) == int(any(row["kernel"] == "wrong" for row in backends.backends()))


def test_kernels_are_compared_where_pairs_are_dropped() -> None:
    rows = {row["mechanism"]: row for row in backends.backends()}
    assert rows["dense"]["kernel"] == "none"
    assert all(rows[name]["kernel"] in ("on", "off") for name in ("latte", "smyrf", "topk", "yoso")), rows
    one, other = (backends._seeded(backends.find("latte"), backends.Pattern.NONCAUSAL_SELF, "reference") for _ in "ab")
    assert backends._distance(one, other) == 0
    other.thresholds.set_base(float("inf"))  # type: ignore[union-attr, operator]
    assert backends._distance(one, other) > 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so that requiring one does not fail")
def test_what_is_required_and_missing_fails(no_compiler: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(CONF, ["require=[cuda]"]) == 1
    assert "failed: require=cuda: off: " in capsys.readouterr().out


def test_json_alone_is_nothing_but_json_and_a_leak_is_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(CONF, ["network=tests.doctor.models:encoder", "mechanisms=[latte,topk]", "json='-'"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["mechanism"] for row in report["masks"]] == ["as it is", "latte", "topk"]
    assert report["failed"] == []
    assert doctor(CONF, ["network=tests.doctor.models:shows_padding", "json='-'"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["failed"][0].startswith("as it is leaks padding (outputs move by ")


def test_settings_are_hyperparameters(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["network=tests.doctor.models:encoder", "mechanisms=topk", "settings.topk.keys=2", "json='-'"]
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
        (["network=tests.doctor.models:nothing"], "nothing"),
        (["network=tests.doctor.models:without_inputs"], "must return a torch.nn.Module and example inputs"),
        (["network=tests.doctor.models:shows_padding", "mechanisms=topk"], "holds mechanisms already"),
    ],
)
def test_a_mistake_is_told(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "machine", dict)
    monkeypatch.setattr(backends, "backends", list)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        doctor(CONF, arguments)


def test_a_shell_sees_one_message_and_an_exit_code(tmp_path: Path) -> None:
    def call(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "thresher.doctor", *arguments]
        return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)

    assert "python -m thresher.doctor network=" in call("--help", cwd=tmp_path).stdout
    mistake = call("requires=[cpu]")
    assert mistake.returncode == 1
    assert mistake.stderr.startswith("error: ")
    assert "Traceback" not in mistake.stderr
