"""The model card of an export: network, data, metrics, how to load it, and the command that trained it."""

import math
from collections.abc import Mapping
from typing import Any

MEASURES = {
    "test/acc": "test accuracy",
    "test/top5": "test top-5 accuracy",
    "test/f1": "test macro-F1",
    "test/perplexity": "test perplexity",
    "test/bits_per_byte": "test bits per byte",
    "test/loss": "test loss",
    "test/kept": "kept (pairs kept / visible)",
    "test/compute": "compute (attention MACs / dense)",
    "train/seconds": "training seconds",
}


def write_card(
    name: str,
    record: Mapping[str, Any],
    metrics: Mapping[str, float | None] | None,
    command: str,
    programs: Mapping[str, str],
    has_adapter: bool = False,
) -> str:
    """Write a model card in Markdown.

    Args:
        name: Of the run.
        record: Of the export: version, config, classes and model arguments.
        metrics: Of the run, by their names in metrics.json; None if there are none.
        command: That trained it; empty if it is not known.
        programs: Further files, with a description of each.
        has_adapter: Whether its mechanisms come from an adapter; the command trained the weights alone.
    """
    config, classes = record["config"], record["classes"]
    mechanisms = {"budget": _describe_node(config["compute"])}
    if has_adapter:
        mechanisms = {"thresholds": "of an adapter, tuned for these weights"}
    sections = [
        f"# {_escape(name)}",
        f"Written by thresher {record['version']}: a network with sparse attention.",
        "## Network",
        _write_list(
            {
                "model": _describe_node(config["model"]),
                "attention": _describe_node(config["attention"]),
                **mechanisms,
                "built for": _write_settings(record["model_arguments"]),
            }
        ),
        "## Data",
        _write_list(
            {"data": _describe_node(config["data"])} | ({"classes": _write_classes(classes)} if classes else {})
        ),
        "## Measured",
        _write_metrics(metrics, "the run that tuned the adapter" if has_adapter else "the checkpoint"),
        "## Load",
        '```python\nimport thresher\n\nnet = thresher.load_model("FOLDER")  # thresholds included\n```',
        "Prepare inputs as the data above do. `python eval.py ckpt=FOLDER` tests it on these data.",
    ]
    if programs:
        sections.append(_write_list({f"`{file}`": text for file, text in programs.items()}))
    if command:
        sections += ["## Weights trained by" if has_adapter else "## Trained by", f"```sh\n{command}\n```"]
    return "\n\n".join(sections) + "\n"


def _write_metrics(metrics: Mapping[str, float | None] | None, source: str) -> str:
    if not metrics:
        return f"Not known: there is no metrics.json beside {source}."
    shown = {label: metrics[key] for key, label in MEASURES.items() if key in metrics}
    rows = [f"| {label} | {'-' if v is None or not math.isfinite(v) else f'{v:.4f}'} |" for label, v in shown.items()]
    return "\n".join(["| what | value |", "| --- | --- |", *rows])


def _describe_node(node: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in node["arguments"].items() if not isinstance(value, Mapping)}
    return f"`{_escape(node['name'])}`" + (f" with {_write_settings(plain)}" if plain else "")


def _write_settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{_escape(str(key))}={_escape(str(value))}" for key, value in values.items())


def _write_classes(classes: list[str]) -> str:
    more = f" and {len(classes) - 20} more" if len(classes) > 20 else ""
    return ", ".join(map(_escape, classes[:20])) + more


def _write_list(entries: Mapping[str, str]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in entries.items())


def _escape(text: str) -> str:
    """Escape the characters of a text that Markdown or a terminal interprets."""
    return "".join(f"\\{c}" if c in "`<>[]|" else c if c.isprintable() else "?" for c in text)
