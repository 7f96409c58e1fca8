"""README tells the truth: its table is what the code says, its commands exist, its examples print what it shows."""

import re
from pathlib import Path

import pytest
import torch

from tests.docs.commands import find_commands
from thresher.attention import Call, Pattern
from thresher.attention.__main__ import build_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LINKS = sorted(set(re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", README)))
LOCAL = re.compile(r"```python\n# src/thresher/attention/local\.py\n(.*?)```", flags=re.DOTALL)


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 130
    assert len(README.encode()) <= 9_000


@pytest.mark.parametrize("page", ["README.md", "docs/mechanisms/index.md"])
def test_table_of_mechanisms_is_the_generated_one(page: str) -> None:
    assert build_table() in (ROOT / page).read_text(), f"paste the output of `python -m thresher.attention` into {page}"


def test_there_are_commands() -> None:
    assert len(find_commands(README)) >= 8


@pytest.mark.parametrize("link", LINKS)
def test_linked_files_exist(link: str) -> None:
    assert (ROOT / link).exists()


def test_both_set_up_commands_are_marked_for_ci() -> None:
    for name in ("main", "test"):
        assert re.search(rf"<!-- {name} -->\n```bash\n[^\n]+\n```\n", README)


def test_the_example_on_a_model_of_ones_own_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = re.findall(r"```python\n(import timm.*?)```", README, flags=re.DOTALL)
    exec(source, {})
    assert [f"# prints: {line}" for line in capsys.readouterr().out.splitlines()] == re.findall(r"# prints: .*", source)


def test_the_example_of_a_mechanism_is_the_one_that_the_guide_explains() -> None:
    (guide,) = LOCAL.findall((ROOT / "docs" / "adding.md").read_text())
    assert LOCAL.findall(README) == [guide]
    code = guide.partition('position."""\n')[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 16


def test_the_example_of_a_mechanism_passes_the_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from thresher import testing

    (source,) = LOCAL.findall(README)
    (tmp_path / "local_example.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    from local_example import Local  # type: ignore[import-not-found]

    testing.check(Local)
    x = torch.randn(2, 2, 9, 4)
    attended = Local(2, 4, Pattern.NONCAUSAL_SELF, window=1)(x, x, x, Call())
    assert attended.cost.kept.tolist() == [[25.0, 25.0]] * 2
    assert not torch.allclose(attended.out, Local(2, 4, Pattern.NONCAUSAL_SELF, window=9)(x, x, x, Call()).out)
