"""One grammar and one word for one thing on every command."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.running import CONF
from thresher.config.commands import compose_options, find_conf, read_help
from thresher.config.overrides import walk_keys

COMMANDS = ("bench", "doctor", "export", "hosts", "report", "sweep")
# What several commands have, and what nobody may call it.
WORDS = {"run.dir": {"dir", "out", "folder"}, "seed": {"seeds"}, "threads": {"num_threads"}, "device": {"devices"}}


def keys_of(name: str) -> set[str]:
    return set(walk_keys(OmegaConf.to_container(compose_options(CONF, name, []), resolve=False)))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_thing_has_the_same_name(name: str) -> None:
    keys = keys_of(name)
    assert "run.dir" in keys
    for word, others in WORDS.items():
        assert not {key for key in keys if key.rpartition(".")[2] in others} - {word}, f"{word} has another name"
        assert {key for key in keys if key.endswith(f".{word}")} <= {word}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("dir=results", "there is no option dir: the folder that a command writes to is run.dir=results"),
        ("out=results", "there is no option out: the folder that a command writes to is run.dir=results"),
        ("--out=results", "options of this command have no dashes; write run.dir=results"),
        ("--seed", r"write seed=\.\.\."),
        ("run.dri=results", "did you mean dir"),
    ],
)
def test_an_argument_that_is_no_option_is_answered_with_one(name: str, argument: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compose_options(CONF, name, [argument])


def test_a_value_without_a_key_is_answered_with_the_key_of_the_input() -> None:
    with pytest.raises(ValueError, match="write runs=runs/mine"):
        compose_options(CONF, "report", ["runs/mine"], input_key="runs")
    with pytest.raises(ValueError, match=r"writes to is run\.dir=runs/mine; what it reads is runs=runs/mine"):
        compose_options(CONF, "report", ["run=runs/mine"], input_key="runs")
    with pytest.raises(ValueError, match="write key=value"):
        compose_options(CONF, "bench", ["headline"])


def test_hyper_parameters_need_no_plus() -> None:
    assert compose_options(CONF, "doctor", ["settings.topk.keys=2"]).settings.topk == {"keys": 2}
    assert compose_options(CONF, "bench", ["settings.latte.kept=0.2"]).settings.latte.kept == 0.2
    with pytest.raises(ValueError, match=r"n takes one value here; write a list as 'n=\[a,b\]'"):
        compose_options(CONF, "bench", ["n=16,32"])


def test_configs_are_found_here_or_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_conf("bench").resolve() == CONF.resolve()
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "bench.yaml").write_text("help: mine\n")
    assert find_conf("bench").resolve() == tmp_path / "conf"
    assert read_help("bench") == "mine"
    with pytest.raises(FileNotFoundError, match=r"there is no conf/nothing\.yaml"):
        find_conf("nothing")
