"""Every file of conf/ composes, and says what the code says."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf
from pytorch_lightning import Trainer

from results import tables
from tests.docs.commands import check_command, find_commands
from tests.running import CONF, tiny_config
from thresher.attention import hyperparameters
from thresher.config.overrides import compose_config
from thresher.tasks.base import Task
from thresher.tasks.tuning import Tuning

CHOICES = [p for p in sorted(CONF.glob("*/*.yaml")) if p.parent.name not in ("bench", "hydra", "sweep", "wandb")]
WITHOUT_DEFAULTS = {"model", "trainer", "logger", "callbacks", "experiment", "debug"}
REQUIRED = {
    "data=image_folder": ["data.root=somewhere"],
    "data=text_corpus": ["data.root=somewhere"],
    "data=text_files": ["data.train=somewhere.csv"],
    "model=hf": ["model.name_or_path=somewhere"],
    "model=sentence_encoder": ["model.name_or_path=somewhere"],
}
OF_DATA = ("num_classes", "class_counts", "vocabulary", "bytes_per_token")  # arguments of tasks
EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))
QUALITIES = {"accuracy", "perplexity", "cosine"}
MEASURED = [  # experiments with the rows of results/ that their own command gave, if they hold a quality
    (path, row)
    for path in EXPERIMENTS
    for table in sorted(tables.FOLDER.glob("*.csv"))
    for row in tables.load_rows(table.name)
    if QUALITIES & set(row)
    if re.fullmatch(rf"python (train|eval)\.py experiment={path.stem}( seed=\d)?", row["command"])
]


def choice_id(path: Path) -> str:
    return f"{path.parent.name}={path.stem}"


@pytest.mark.parametrize("path", CHOICES, ids=choice_id)
def test_every_choice_composes(path: Path, tmp_path: Path) -> None:
    overrides = [choice_id(path), *REQUIRED.get(choice_id(path), ())]
    config = compose_config(CONF, "train", ["run.name=test", f"run.dir='{tmp_path}'", *overrides])
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("path", [p for p in CHOICES if p.parent.name not in WITHOUT_DEFAULTS], ids=choice_id)
def test_yaml_mirrors_the_keyword_arguments(path: Path, tmp_path: Path) -> None:
    node = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(node, dict)
    wanted = {}
    function = get_object(node["_target_"])
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is not parameter.empty:
            wanted[parameter.name] = parameter.default
    for name in OF_DATA:
        wanted.pop(name, None)
    if path.parent.name == "task" and function is not Tuning:  # which takes no step that could be clipped or skipped
        for base in function.__mro__[1 : function.__mro__.index(Task) + 1]:
            own = inspect.signature(base).parameters.values()
            wanted |= {p.name: p.default for p in own if p.default is not p.empty}
    if path.parent.name == "attention":
        wanted = hyperparameters(function)
    given = {key: value for key, value in node.items() if not key.startswith("_") and value != "???"}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in wanted.items()}
    if path.stem == "auto":
        plain["required"] = False
    assert given == plain


@pytest.mark.parametrize("path", sorted((CONF / "callbacks").glob("*.yaml")), ids=choice_id)
def test_callbacks_build(path: Path, tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, choice_id(path))
    for node in (cfg.callbacks or {}).values():
        instantiate(node, _convert_="all")


@pytest.mark.parametrize("path", sorted((CONF / "trainer").glob("*.yaml")), ids=choice_id)
def test_trainers_name_real_options(path: Path, tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, choice_id(path))
    make = instantiate(cfg.trainer, _convert_="all")
    assert make.func is Trainer
    inspect.signature(Trainer).bind(**make.keywords)
    if cfg.trainer.accelerator == "cpu" or torch.cuda.is_available():
        make(logger=False, enable_checkpointing=False)


def read_header(path: Path) -> str:
    return "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=choice_id)
def test_the_commands_of_an_experiment_compose(path: Path) -> None:
    commands = find_commands(read_header(path))
    assert [c for c in commands if choice_id(path) in c.split()]
    for command in commands:
        check_command(command)


@pytest.mark.parametrize(("path", "row"), MEASURED, ids=lambda value: getattr(value, "stem", ""))
def test_an_experiment_expects_what_was_measured(path: Path, row: dict[str, str]) -> None:
    """The header holds what the row of results/ holds, to two places or more."""
    expected = re.findall(r"\d+(?:\.\d+)?", read_header(path))
    quality = [row[column] for column in QUALITIES & set(row)]
    assert len(quality) == 1
    for cell in (*quality, *([row["kept"]] if "train.py" in row["command"] else [])):
        assert any(agrees(number, cell) for number in expected), f"the header of {path.name} lacks {cell}"


def agrees(number: str, cell: str) -> bool:
    places = len(number.partition(".")[2])
    return places >= min(2, len(cell.partition(".")[2])) and abs(float(number) - float(cell)) <= 0.501 * 10**-places


def test_no_config_has_a_place_for_a_key(tmp_path: Path) -> None:
    from thresher.config.redact import SECRET

    for path in CHOICES:
        assert not [line for line in path.read_text().splitlines() if SECRET.search(line.partition(":")[0].strip())]


def test_primary_config_names_each_group_once() -> None:
    groups = {path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("bench", "sweep", "wandb")}
    listed = {next(iter(entry)) for entry in OmegaConf.load(CONF / "train.yaml").defaults if entry != "_self_"}
    assert listed == groups


def test_defaults_are_those_of_the_main_job() -> None:
    cfg = compose_config(CONF, "train", ["run.name=x", "run.dir=y"])
    assert cfg.attention._target_.endswith("Latte")
    assert cfg.compute.target == 0.15
    assert cfg.compute.required is False
