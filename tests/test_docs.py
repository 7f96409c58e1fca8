"""The pages in docs/ tell the truth: their commands exist, their links lead somewhere, their code runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from tests.running import CONF
from thresher import overrides
from thresher.hosts.__main__ import TOKENS, build
from thresher.sweep.space import read_spaces

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {page.name: page.read_text() for page in sorted(DOCS.glob("*.md"))}
WRITTEN = "".join(PAGES.values()).replace("\\\n", "")
COMMANDS = sorted({c.strip(" `") for c in re.findall(r"python (?:train|eval)\.py [^\n#|`]+", WRITTEN)})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command: str) -> None:
    _, program, *arguments = shlex.split(command)
    given = [a for a in arguments if a != "-m" and not (program == "eval.py" and a.startswith("ckpt="))]
    overrides.check(CONF, "train", given)
    if "-m" in arguments:
        given = list(read_spaces(given, {}).grid()[0])
    overrides.compose_config(CONF, "train", ["run.name=x", *given])


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page: str) -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", PAGES[page]):
        assert (DOCS / link).exists(), link


def test_trials_name_tests_that_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGES["faults.md"])
    assert len(set(re.findall(r"^\| (\d+) \|", PAGES["faults.md"], flags=re.MULTILINE))) == 25
    tests = DOCS.parent / "tests"
    assert not [f"{file}::{test}" for file, test in named if f"def {test}(" not in (tests / file).read_text()]


def test_the_example_on_a_language_model_works(tmp_path: Path) -> None:
    (source,) = re.findall(r"```python\n(import transformers.*?)```", PAGES["language.md"], flags=re.DOTALL)
    plain = build("Llama")
    plain.save_pretrained(tmp_path / "plain")
    names = {"folder": tmp_path / "plain", "other": tmp_path / "sparse", "batches": [TOKENS], "prompt": TOKENS}
    exec(source, names)
    assert names["text"].shape == (2, TOKENS.shape[1] + 8)
    assert torch.equal(names["model"].eval()(TOKENS)[0], plain(TOKENS)[0])
