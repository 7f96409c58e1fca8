"""The options of the commands `python -m thresher.NAME`: `key=value`, checked against `conf/NAME.yaml`."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from thresher.config import overrides

BESIDE_THE_PACKAGE = Path(__file__).parents[3]
OTHER_NAMES = {"dir": "run.dir", "out": "run.dir", "output": "run.dir"}  # common names for the folder


def find_conf(name: str) -> Path:
    """Find the folder of configs that holds `NAME.yaml`: `conf` in the working directory, or beside the package.

    Raises:
        FileNotFoundError: Neither holds it.
    """
    for root in (Path(), BESIDE_THE_PACKAGE):
        if (root / "conf" / f"{name}.yaml").is_file():
            return root / "conf"
    raise FileNotFoundError(f"there is no conf/{name}.yaml here: call this in the folder of train.py")


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Tell whether a command line asks for help."""
    return not {"-h", "--help"}.isdisjoint(arguments)


def read_help(name: str) -> str:
    """Read the help of a command from its primary config."""
    text: str = OmegaConf.load(find_conf(name) / f"{name}.yaml").help
    return text


def compose_options(conf: Path, name: str, arguments: Sequence[str], input_key: str = "") -> DictConfig:
    """Check the arguments of a command against its primary config, and compose it.

    Hyper-parameters, `settings.MECHANISM.KEY`, need no +, listed or not; the command checks them.

    Args:
        conf: Folder of configs.
        name: Of the primary config.
        arguments: `key=value`, in Hydra's grammar.
        input_key: The key that an argument without one is meant for.

    Raises:
        ValueError: An argument has no key, or the config has no such key, choice or type of value.
    """
    for argument in arguments:
        _check_grammar(conf, name, argument, input_key)
    parsed = overrides.parse(arguments)
    for override in parsed:
        if override.is_sweep_override():
            key = override.key_or_group
            varied = "overrides that a sweep varies follow --" if name == "sweep" else f"write a list as '{key}=[a,b]'"
            raise ValueError(f"{key} takes one value here; {varied}")
    overrides.check(conf, name, [a for a in arguments if not _is_setting(a)])
    return overrides.compose_config(conf, name, [f"++{a}" if _is_setting(a) else a for a in arguments])


def _check_grammar(conf: Path, name: str, argument: str, input_key: str) -> None:
    key, equals, value = argument.partition("=")
    if argument.startswith("-"):
        key = key.lstrip("-").replace("-", "_")
        meant = OTHER_NAMES.get(key, key)
        raise ValueError(f"{argument}: options of this command have no dashes; write {meant}={value or '...'}")
    if not equals and not argument.startswith("~"):
        meant = f"write {input_key}={overrides.quote(argument)}" if input_key else "write key=value"
        raise ValueError(f"{argument!r} is not an option; {meant}")
    if key == "run":
        reads = f"; what it reads is {input_key}={value}" if input_key else ""
        raise ValueError(f"run is not an option: the folder that this command writes to is run.dir={value}{reads}")
    if key in OTHER_NAMES and key not in OmegaConf.load(conf / f"{name}.yaml"):
        raise ValueError(f"there is no option {key}: the folder that a command writes to is run.dir={value or '...'}")


def _is_setting(argument: str) -> bool:
    return argument.startswith("settings.")
