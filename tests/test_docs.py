"""The pages in docs/ tell the truth: their commands, README's and those of results/ exist, links lead somewhere."""

import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from results import tables
from tests.docs.commands import check_command, find_commands
from thresher.hosts.__main__ import TOKENS, build

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {str(page.relative_to(DOCS)): page.read_text() for page in sorted(DOCS.rglob("*.md"))}
README = (DOCS.parent / "README.md").read_text()
MEASURED = [
    re.sub(r" seed=\d", "", row["command"])
    for path in tables.FOLDER.glob("*.csv")
    for row in tables.load_rows(path.name)
]
SHOWN = {command for text in (*PAGES.values(), README, *MEASURED) for command in find_commands(text)}
CODE = re.compile(r"```.*?```", flags=re.DOTALL)
ADDED = re.compile(r"attention=local\b|thresher\.testing (local|mine:)|thresher\.NAME")  # what a reader adds or puts in
ADDED_FILES = re.compile(r"attention/local\b|/NAME|mechanisms/local")
ADDED_OBJECTS = re.compile(r"attention\.local\b|thresher\.NAME")
COMMANDS = sorted(command for command in SHOWN if not ADDED.search(command))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command: str) -> None:
    check_command(command)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 40


@pytest.mark.parametrize(
    "command",
    [
        "python train.py attention=lotte",
        "python train.py attention=topk attention.kys=3",
        "python eval.py ckpt=x data.batch=3",
        "python -m thresher.sweep name=x samplr=tpe -- seed=0,1",
        "python -m thresher.sweep name=x -- sed=0,1",
        "python -m thresher.sweep -- seed=0,1",
        "python -m thresher.bench bench.threads=2",
        "python -m thresher.bench thread=2",
        "python -m thresher.bench n=1024,2048",
        "python -m thresher.bench 'mechanisms=[lotte]'",
        "python -m thresher.bench settings.latte.estimate.bit=8",
        "python -m thresher.report runs/sweeps/mine",
        "python -m thresher.report runs=runs --details 3",
        "python -m thresher.report runs=runs dir=out",
        "python -m thresher.export ckpt=RUN out=DIR",
        "python -m thresher.export run.dir=DIR",
        "python -m thresher.doctor network=bert --json",
        "python -m thresher.testing lotte",
        "python -m thresher.hosts bert",
        "python -m thresher.attention.latte",
        "python -m thresher.weep name=x",
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str) -> None:
    with pytest.raises(Exception, match=r"."):
        check_command(command)


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page: str) -> None:
    for link in re.findall(r"\]\((?!http|#)([^)#]+)(?:#[^)]*)?\)", CODE.sub("", PAGES[page])):
        target = (DOCS / page).parent / link
        assert target.exists(), link
        assert DOCS in target.resolve().parents, f"{link} is no page of the site; name the file instead"


def test_every_page_is_in_the_navigation() -> None:
    text = (DOCS.parent / "mkdocs.yml").read_text()
    listed = re.findall(r"[\w/]+\.md", text[text.index("\nnav:") :])
    assert sorted(listed) == sorted(PAGES)
    assert yaml.safe_load(text)["docs_dir"] == DOCS.name


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_named_files_exist(page: str) -> None:
    named = re.findall(r"`((?:src|conf|tests|results)/[\w./-]+)`", PAGES.get(page, README))
    missing = [file for file in named if not (DOCS.parent / file).exists() and not ADDED_FILES.search(file)]
    assert not missing


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_named_objects_exist(page: str) -> None:
    for name in set(re.findall(r"(?<![\w/.])thresher(?:\.\w+)+", PAGES.get(page, README))):
        if not ADDED_OBJECTS.search(name):
            assert pkgutil.resolve_name(name), name


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


def test_the_example_on_a_vision_model_works() -> None:
    (source,) = re.findall(r"```python\n(import timm.*?)```", PAGES["start.md"], flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(source, names)
    assert len(names["names"]) == 12  # type: ignore[arg-type]


def test_the_example_of_a_loop_of_ones_own_keeps_its_budget() -> None:
    (source,) = re.findall(r"```python\n(import itertools.*?)```", PAGES["training.md"], flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(source, names)
    assert float(names["kept"].detach()) == pytest.approx(0.2, abs=0.1)
    assert float(names["loss"].detach()) < 2.0, "chance is 2.3"


def test_the_example_with_nested_options_works() -> None:
    import timm

    import thresher

    (call,) = re.findall(r"`(thresher\.sparsify\(model, \"latte\", threshold=.*?\))`", PAGES["start.md"])
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    exec(call, {"thresher": thresher, "model": model})
    assert [name for name, _ in model.named_parameters() if "threshold" in name]
