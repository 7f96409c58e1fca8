"""The page: one HTML file that opens from disk, needs no network and runs only its own scripts."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from thresher.tools.report.maps import load_maps
from thresher.tools.report.settings import AXES, Setting, lower_is_better, name_axis
from thresher.tools.report.summary import (
    Summary,
    describe_setting,
    describe_training_differences,
    format_key,
    format_value,
)

SCRIPTS = ("shared.js", "front.js", "run.js", "maps.js", "table.js", "main.js")
LISTED = 100  # failed, stopped or running runs that the page shows


def render_page(summary: Summary, roots: Sequence[str], details: Mapping[str, Any]) -> str:
    """Render the HTML of a report.

    Args:
        summary: What to show.
        roots: Names of the folders that were read.
        details: Heads and curves of the runs that the page offers, by place.
    """
    maps, map_problems = load_maps(summary.runs)
    scripts = [_script(get_plotlyjs()), _script("(() => {\n'use strict';\n" + _own_scripts() + "})();\n")]
    environment = Environment(
        loader=PackageLoader("thresher.tools.report", "web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("page.html").render(
        summary=summary,
        roots=roots,
        listed=LISTED,
        detailed=len(details),
        maps=maps,
        map_problems=map_problems,
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        policy=f"default-src 'none'; script-src {' '.join(digest for digest, _ in scripts)}; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'",
        style=Markup(_asset("page.css")),
        data=Markup(_json(_data(summary, details) | {"maps": maps})),
        scripts=[Markup(text) for _, text in scripts],
    )


def _asset(name: str) -> str:
    return (resources.files("thresher.tools.report") / "web" / name).read_text(encoding="utf-8")


def _own_scripts() -> str:
    return "\n".join(_asset(name) for name in SCRIPTS)


def _script(text: str) -> tuple[str, str]:
    """Return the digest by which the page's policy admits a script, and the script."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    assert "</script" not in text.lower()
    assert "<!--" not in text
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'", text


def _json(data: Any) -> str:
    """Write JSON that can neither end a script element nor open a comment."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(summary: Summary, details: Mapping[str, Any]) -> dict[str, Any]:
    tasks = list(summary.tasks)
    place = {id(run): i for i, run in enumerate(summary.runs)}
    setting_of = {id(run): i for i, setting in enumerate(summary.settings) for run in setting.runs}
    names = sorted({name for task in tasks for name in _measures(summary, task)})
    return {
        "tasks": [
            {
                "name": task,
                "metrics": [{"name": name, "lower": lower_is_better(name)} for name in metrics],
                "note": describe_training_differences(summary, task),
                "keys": [[format_key(key), format_value(key, common)] for key, common in summary.columns[task].items()],
            }
            for task, metrics in summary.tasks.items()
        ],
        "measures": names,
        "fronts": [[tasks.index(f.task), f.metric, f.axis, f.places] for f in summary.fronts],
        "settings": [
            {
                "task": tasks.index(setting.task),
                "mechanism": setting.mechanism,
                "evaluation": setting.evaluation,
                "label": describe_setting(summary, setting),
                "runs": [place[id(run)] for run in setting.runs],
                "twin": summary.twins.get(i),
                "values": [
                    format_value(key, setting.config[key]) if key in setting.config else None
                    for key in summary.columns[setting.task]
                ],
                "spreads": [_spread(setting, name) for name in names],
            }
            for i, setting in enumerate(summary.settings)
        ],
        "runs": [
            {
                "name": run.name,
                "seed": run.config.get("seed"),
                "setting": setting_of.get(id(run)),
                "command": command,
                "values": [run.metrics.get(name) for name in names],
            }
            for run, command in zip(summary.runs, summary.commands, strict=True)
        ],
        "details": details,
    }


def _measures(summary: Summary, task: str) -> set[str]:
    metrics = summary.tasks[task]
    return {*metrics, *(name_axis(metric, axis) for metric in metrics for axis in AXES), "train/seconds"}


def _spread(setting: Setting, name: str) -> list[float | None] | None:
    spread = setting.spread(name)
    return None if spread is None else [spread.mean, spread.deviation]
