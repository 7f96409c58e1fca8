"""README tells the truth: its table is what the code says, its commands exist."""

import re
import shlex
from pathlib import Path

import pytest

from tests.running import CONF
from thresher import overrides
from thresher.attention.__main__ import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"^\s*(python train\.py[^\n#|`]*)", README, flags=re.MULTILINE)))
LINKS = sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README)))


def test_table_of_mechanisms_is_the_generated_one() -> None:
    assert table() in README, "paste the output of `python -m thresher.attention` into README.md"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command: str) -> None:
    arguments = [a for a in shlex.split(command)[2:] if a != "-m"]
    if not any(a.startswith("--") for a in arguments):
        overrides.check(CONF, "train", arguments)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("link", LINKS)
def test_linked_files_exist(link: str) -> None:
    assert (ROOT / link).exists()


def test_both_set_up_commands_are_marked_for_ci() -> None:
    for name in ("main", "test"):
        assert re.search(rf"<!-- {name} -->\n```bash\n[^\n]+\n```\n", README)


def test_the_example_of_a_mechanism_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from thresher.attention import Call, Pattern

    (source,) = re.findall(r"```python\n# src/thresher/attention/local\.py\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "local_example.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    from local_example import Local  # type: ignore[import-not-found]

    x = torch.randn(2, 2, 9, 4)
    attended = Local(2, 4, Pattern.NONCAUSAL_SELF, window=1)(x, x, x, Call())
    assert attended.cost.kept.tolist() == [[25.0, 25.0]] * 2
    assert not torch.allclose(attended.out, Local(2, 4, Pattern.NONCAUSAL_SELF, window=9)(x, x, x, Call()).out)


def test_the_example_on_a_model_of_ones_own_works() -> None:
    (source,) = re.findall(r"```python\nimport timm.*?```", README, flags=re.DOTALL)
    exec(source.removeprefix("```python\n").removesuffix("```"), {})
