"""The help of train.py: the groups that it has, and examples."""

import textwrap
from pathlib import Path

from omegaconf import OmegaConf

from thresher.config import overrides
from thresher.console import accept_any_text

WIDTH = 120
GROUPS = "$APP_CONFIG_GROUPS"  # in the template, as Hydra names it; Hydra would list those of all commands


def print_help(conf: Path, name: str) -> None:
    """Print the help of the primary config `name`."""
    accept_any_text()
    print(build_help(conf, name))


def build_help(conf: Path, name: str) -> str:
    """Build the help of a primary config from its template, with the groups of its defaults list."""
    config = OmegaConf.load(conf / f"{name}.yaml")
    groups = []
    for entry in config.defaults:
        if entry != "_self_":
            ((group, default),) = entry.items()
            choices = overrides.list_choices(conf, group)
            ordered = [c for c in choices if c == default] + [c for c in choices if c != default]
            groups.append(textwrap.fill(f"{group}: {', '.join(ordered)}", WIDTH, subsequent_indent="    "))
    template: str = config.hydra.help.template
    return template.replace(GROUPS, "\n".join(groups) + "\n")
