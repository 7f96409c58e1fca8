"""Commands that pages show, and whether they would be accepted."""

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

from omegaconf import DictConfig, OmegaConf

from tests.running import CONF
from thresher.attention import find, hyperparameters
from thresher.attention.options import flatten_options
from thresher.config import overrides
from thresher.config.commands import compose_options
from thresher.tools.sweep.space import read_spaces

COMMAND = re.compile(r"python (?:(?:train|eval)\.py|-m thresher\.\w+)[^\n#|`]*")
INTERVAL = re.compile(r"(?:tag\(log,)?interval\(([^,]+),[^)]*\)+")
TOOLS = ("sweep", "bench", "report", "export", "doctor", "hosts")  # commands with a primary config of their own
NAMES_MECHANISMS = ("testing",)  # commands that take names of mechanisms
OF_THE_BENCHMARK = {"kept", "n"}  # settings of a mechanism that are none of its own


def find_commands(text: str) -> list[str]:
    """List the commands of our programs in a page, with continued lines joined."""
    return sorted({command.strip() for command in COMMAND.findall(re.sub(r"\\\n\s*", "", text))})


def check_command(command: str) -> None:
    """Compose the config that a command asks for.

    Raises:
        ValueError: An option, group, mechanism or module does not exist.
    """
    program, *arguments = shlex.split(command.removeprefix("python ").removeprefix("-m "))
    name = program.removesuffix(".py").removeprefix("thresher.")
    if name in ("train", "eval"):
        if not {"--help", "--cfg"} & set(arguments):
            _check_training([a for a in arguments if a != "-m"], evaluation=name == "eval", many="-m" in arguments)
    elif find_spec(program) is None or find_spec(f"{program}.__main__") is None:
        raise ValueError(f"there is no command {program}")
    elif "--help" in arguments or not arguments:  # without arguments a page names a command, not a call
        return
    elif name in TOOLS:
        _check_tool(name, arguments)
    elif name in NAMES_MECHANISMS:
        for mechanism in arguments:
            import_module(f"thresher.{name}.__main__").load(mechanism)
    else:
        raise ValueError(f"{program} takes no arguments; got {' '.join(arguments)}")


def _check_tool(name: str, arguments: list[str]) -> None:
    own, _, trained = " ".join(map(shlex.quote, arguments)).partition(" -- ")
    given = shlex.split(own)
    cfg = compose_options(CONF, name, given)
    if missing := OmegaConf.missing_keys(cfg):
        raise ValueError(f"{name} needs {', '.join(sorted(missing))}")
    if "settings" in cfg:
        _check_settings(cfg)
    if trained:
        _check_training(shlex.split(trained), evaluation="program=eval.py" in given, many=True)


def _check_settings(cfg: DictConfig) -> None:
    """Check the hyper-parameters that a command gives to mechanisms, and their names."""
    named = cfg.mechanisms if OmegaConf.is_list(cfg.mechanisms) else [cfg.mechanisms]
    for mechanism in (*filter(None, named), *cfg.settings):
        if unknown := sorted({*_flatten(cfg.settings.get(mechanism))} - {*_flatten(hyperparameters(find(mechanism)))}):
            raise ValueError(f"{mechanism} has no {', '.join(unknown)}")


def _flatten(options: DictConfig | dict[str, object] | None) -> Iterator[str]:
    plain = OmegaConf.to_container(options) if OmegaConf.is_config(options) else options or {}
    return (name for name in flatten_options(plain) if name not in OF_THE_BENCHMARK)  # type: ignore[arg-type]


def _check_training(arguments: list[str], *, evaluation: bool, many: bool) -> None:
    own = ("ckpt=", "adapter=", "explain") if evaluation else ()
    given = [INTERVAL.sub(r"\1", a) for a in arguments if not a.startswith(own)]
    overrides.check(CONF, "train", given)
    if many:
        given = list(read_spaces(given, {}).grid()[0])
    overrides.compose_config(CONF, "train", ["run.name=x", *given])
