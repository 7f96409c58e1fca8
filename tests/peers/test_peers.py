"""The program that runs other libraries' tests, on a small folder of tests in their style."""

import csv
import json
import os
from pathlib import Path

import pytest
import timm
import torch
import transformers

from tests.assets import VARIABLE
from tests.peers import __main__ as program
from tests.peers import counts, running, sources
from tests.peers.families import FAMILIES, Family
from tests.peers.inside.peers_plugin import DENSE_LIMIT, Sparsifier
from tests.peers.inside.peers_suite import MODELS, Small
from tests.peers.inside.peers_transformers import watch
from thresher.hosts import mounted

TESTS = """
import os
import pytest
import timm
import torch

@pytest.fixture
def model():
    return timm.create_model("test_vit", img_size=32)

def is_dense(model):
    return type(model.blocks[0].attn).__module__.startswith("timm")

@pytest.mark.parametrize("model_name", ["test_vit"])
def test_forward(model_name):
    assert timm.create_model(model_name)(torch.zeros(1, 3, 160, 160)).shape == (1, 1000)

@pytest.mark.parametrize("model_name", ["another"])
def test_of_another_model(model_name):
    raise AssertionError("not asked for")

@pytest.mark.parametrize("model_name", ["test_vit"])
class TestParts:
    def test_that_needs_the_original(self, model, model_name):
        assert is_dense(model), "this is not the original attention"

    def test_that_always_fails(self, model_name):
        raise AssertionError("always")

    def test_that_is_skipped(self, model_name):
        pytest.skip("for some reason")

    def test_that_kills_the_process(self, model, model_name):
        if not is_dense(model):
            os._exit(3)

    def test_that_comes_after(self, model_name):
        pass
"""
SMALL = {"small": Family("small", "timm", "tests/test_models.py", models=("test_vit",))}
BROKEN = [
    "test_that_comes_after[test_vit]",
    "test_that_kills_the_process[test_vit]",
    "test_that_needs_the_original[test_vit]",
]
ALLOWED = """
[[allowed]]
family = "small"
test = "test_that_needs_*"
error = "not the original"
reason = "It asks for the original class"

[[allowed]]
test = "test_that_[ck]*"
reason = "It stops the process"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of tests as a library has them, and where the program's output goes."""
    folder = tmp_path_factory.mktemp("peers")
    (folder / "library" / "tests").mkdir(parents=True)
    (folder / "library" / "tests" / "test_models.py").write_text(TESTS)
    (folder / "none.toml").write_text("")
    (folder / "some.toml").write_text(ALLOWED)
    (folder / "other.toml").write_text(ALLOWED.replace("not the original", "another message"))
    return folder


def run(folder: Path, allowed: str) -> int:
    arguments = [str(folder / "out"), "--modes", "dense", "--tests", f"timm={folder / 'library'}"]
    return program.main([*arguments, "--allowed", str(folder / allowed)], SMALL)


@pytest.fixture(scope="module")
def ran(folder: Path) -> Path:
    """Return the output of a run that allows nothing."""
    assert run(folder, "none.toml") == 1
    return folder / "out"


def test_counts_say_how_tests_ended_without_and_with_the_mechanism(ran: Path):
    (row,) = csv.DictReader((ran / "counts.csv").read_text().splitlines())
    assert row == {
        "family": "small", "mode": "dense", "models": "1", "left_dense": "0", "passed": "1", "failed_without": "1",
        "failed_with": "2", "new": "3", "allowed": "0",
    }  # fmt: skip


def test_a_test_that_the_mechanism_breaks_is_a_new_failure(ran: Path):
    failures = list(csv.DictReader((ran / "failures.csv").read_text().splitlines()))
    assert [failure["test"].rpartition("::")[2] for failure in failures] == BROKEN
    assert [failure["outcome"] for failure in failures] == ["not reached", "unfinished", "failed"]
    assert "this is not the original attention" in failures[-1]["error"]


def test_the_mechanism_is_in_the_models_that_tests_build(ran: Path):
    without, dense = (running.load(ran / "small" / f"{mode}.json") for mode in ("without", "dense"))
    depth = len(timm.create_model("test_vit").blocks)
    assert without is not None
    assert without.sparsified == {}
    assert dense is not None
    assert dense.sparsified == {"VisionTransformer": depth}
    assert "exit status 3" in dense.stopped


def test_what_was_run_is_not_run_again(ran: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running.subprocess, "Popen", None)
    assert run(folder, "none.toml") == 1
    monkeypatch.setattr(program, "hash_of", lambda *_: "other sources")
    with pytest.raises(TypeError):
        run(folder, "none.toml")


def test_only_failures_that_are_allowed_by_name_and_message_pass(
    ran: Path, folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(folder, "some.toml") == 0
    assert "- It stops the process (2 tests)" in capsys.readouterr().out
    assert run(folder, "other.toml") == 1
    error = capsys.readouterr().err
    assert "1 not explained" in error
    assert BROKEN[-1] in error
    assert BROKEN[0] not in error


def test_a_run_that_takes_too_long_is_stopped(folder: Path, tmp_path: Path):
    outcome = running.run(
        SMALL["small"], "without", folder / "library", tmp_path / "log.jsonl", timeout=0, test_timeout=1
    )
    assert outcome.stopped == "stopped after 0 s"
    assert not outcome.outcomes


def test_a_test_fails_if_any_part_of_it_fails_and_is_unfinished_if_it_never_ends(tmp_path: Path):
    parts = [("a", "begun"), ("a", "failed"), ("a", "passed"), ("b", "begun"), ("c", "begun"), ("c", "passed")]
    lines = [json.dumps({"test": test, "outcome": outcome, "error": "why"}) for test, outcome in parts]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"test": "d", "outc']))
    outcome = running.read(tmp_path / "log.jsonl")
    assert outcome.outcomes == {"a": "failed", "b": "unfinished", "c": "passed"}
    assert outcome.errors == {"a": "why"}


def test_a_run_that_shows_nothing_is_no_success():
    nothing = running.Outcome(left_dense={"BertModel": ["it has no attention"]})
    lines = counts.complain(counts.count("bert", "dense", nothing, nothing, []), nothing, [])
    assert len(lines) == 2
    assert "in no model: {'BertModel': ['it has no attention']}" in lines[0]
    assert "no test passes" in lines[1]


@pytest.mark.parametrize("mistake", ["--only=bert,elmo", "--modes=yoso", "--tests=timm", "--tests=keras=."])
def test_mistakes_are_named(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        program.main([str(tmp_path / "out"), mistake])
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert any(word in error for word in ("no elmo", "no yoso", "timm=FOLDER")), error


def test_a_folder_without_a_familys_tests_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "tests").mkdir()
    assert program.main([str(tmp_path / "out"), "--only", "bert", "--tests", f"transformers={tmp_path}"]) == 2
    assert "--tests transformers=PATH" in capsys.readouterr().err


def test_small_models_stand_in_where_only_the_common_tests_are(tmp_path: Path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_modeling_common.py").write_text("")
    sources.complete(tmp_path, FAMILIES["clip"])
    text = (tmp_path / "tests/models/clip/test_modeling_clip.py").read_text()
    assert text.count("case(") == 3
    assert (tmp_path / "tests/models/__init__.py").exists()


@pytest.mark.parametrize("name", MODELS)
def test_a_small_model_of_each_family_takes_the_mechanism(name: str):
    small = MODELS[name]
    lines: list[dict] = []
    torch.manual_seed(0)
    with watch(Sparsifier("dense", lambda **line: lines.append(line))):
        model = build(small)
    (line,) = lines
    assert line["mechanisms"] == len(mounted(model)) > 0, line
    inputs = small.inputs()
    torch.manual_seed(0)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs)[0], build(small).eval()(**inputs)[0])


def test_examples_have_the_precision_of_the_model(tmp_path: Path):
    build(MODELS["whisper"]).save_pretrained(tmp_path)
    with watch(Sparsifier("dense", lambda **_: None)):
        model = transformers.WhisperModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert mounted(model)


def test_models_are_watched_when_loaded_or_newly_defined_until_the_watch_ends(tmp_path: Path):
    build(MODELS["vit"]).save_pretrained(tmp_path)
    lines: list[dict] = []
    with watch(Sparsifier("topk", lambda **line: lines.append(line))):

        class Mine(transformers.ViTForImageClassification):
            def __init__(self, config: transformers.ViTConfig) -> None:
                super().__init__(config)

        assert mounted(transformers.ViTModel.from_pretrained(tmp_path))
        assert mounted(Mine(MODELS["vit"].configure()))
    assert [line["model"] for line in lines] == ["ViTModel", "Mine"]
    assert not mounted(build(MODELS["vit"]))
    assert not mounted(Mine(MODELS["vit"].configure()))


def test_a_switch_to_another_implementation_takes_the_mechanism_out_first():
    with watch(Sparsifier("dense", lambda **_: None)):
        model = build(MODELS["bert"])
        assert mounted(model)
        model.set_attn_implementation("eager")
    assert not mounted(model)
    assert model.config._attn_implementation == "eager"


def test_watching_leaves_the_random_numbers_of_a_test_as_they_were():
    drawn = []
    for mode in (None, *DENSE_LIMIT):
        torch.manual_seed(0)
        if mode:
            with watch(Sparsifier(mode, lambda **_: None)):
                build(MODELS["bert"])
        else:
            build(MODELS["bert"])
        drawn.append(torch.rand(3))
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0], rtol=0, atol=0)


def test_docs_hold_the_table_between_two_marks(tmp_path: Path):
    page = tmp_path / "peers.md"
    page.write_text(f"before\n{counts.START}\nold\n{counts.END}\nafter\n")
    row = counts.Count("bert", "dense", 4, 0, passed=90, failed_without=1, failed_with=3, new=2, allowed=2)
    counts.write_between(page, counts.as_table([row]))
    text = page.read_text()
    assert "| bert | 4 | 1 | 90, 3, 2 |" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    page.write_text("no marks")
    with pytest.raises(ValueError, match="needs one line"):
        counts.write_between(page, "")


def test_every_reason_of_the_allow_list_is_a_sentence():
    for allowance in counts.read_allowances(program.ALLOWED):
        assert len(allowance.reason.split()) > 4, allowance


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_transformers_own_tests_of_vit_pass_with_dense_but_for_what_is_allowed(tmp_path: Path):
    try:
        sources.root_of("transformers", tmp_path, None)
    except sources.NoTests as error:
        if os.environ.get(VARIABLE) == "required":
            pytest.fail(f"{error} ({VARIABLE}=required)", pytrace=False)
        pytest.skip(str(error))
    assert program.main([str(tmp_path), "--only", "vit", "--modes", "dense"]) == 0


def build(small: Small) -> transformers.PreTrainedModel:
    return getattr(transformers, small.classes[0])(small.configure())
