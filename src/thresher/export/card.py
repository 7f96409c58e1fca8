"""The model card of an export: what it is, what it measured, how to load it, what made it."""

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


def card(
    name: str,
    record: Mapping[str, Any],
    metrics: Mapping[str, float | None] | None,
    command: str,
    programs: Mapping[str, str],
) -> str:
    """Write a model card in Markdown.

    Args:
        name: Of the run.
        record: What the export says of its network.
        metrics: Measured in the run, by their names in metrics.json; None where nobody measured.
        command: What trained it; empty where that is not known.
        programs: Further files, and what to say of each.
    """
    config, classes = record["config"], record["classes"]
    sections = [
        f"# {_plain(name)}",
        f"Written by thresher {record['version']}: a network with sparse attention.",
        "## Network",
        _list(
            {
                "model": _summary(config["model"]),
                "attention": _summary(config["attention"]),
                "budget": _summary(config["compute"]),
                "built for": _settings(record["model_arguments"]),
            }
        ),
        "## Data",
        _list({"data": _summary(config["data"])} | ({"classes": _names(classes)} if classes else {})),
        "## Measured",
        _measured(metrics),
        "## Load",
        '```python\nimport thresher\n\nnet = thresher.load_model("FOLDER")  # thresholds included\n```',
        "Inputs are prepared as the data above prepare them. `python eval.py ckpt=FOLDER` tests it on these data.",
    ]
    if programs:
        sections.append(_list({f"`{file}`": text for file, text in programs.items()}))
    if command:
        sections += ["## Trained by", f"```sh\n{command}\n```"]
    return "\n\n".join(sections) + "\n"


def _measured(metrics: Mapping[str, float | None] | None) -> str:
    if not metrics:
        return "Not known: no metrics.json lay beside the checkpoint."
    shown = {label: metrics[key] for key, label in MEASURES.items() if key in metrics}
    rows = [f"| {label} | {'-' if v is None or not math.isfinite(v) else f'{v:.4f}'} |" for label, v in shown.items()]
    return "\n".join(["| what | value |", "| --- | --- |", *rows])


def _summary(node: Mapping[str, Any]) -> str:
    target = str(node["_target_"])
    plain = {k: v for k, v in node.items() if not k.startswith("_") and not isinstance(v, Mapping)}
    return f"`{_plain(target)}`" + (f" with {_settings(plain)}" if plain else "")


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{_plain(str(key))}={_plain(str(value))}" for key, value in values.items())


def _names(classes: list[str]) -> str:
    more = f" and {len(classes) - 20} more" if len(classes) > 20 else ""
    return ", ".join(map(_plain, classes[:20])) + more


def _list(entries: Mapping[str, str]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in entries.items())


def _plain(text: str) -> str:
    """Take from a text what Markdown or a terminal would act on."""
    return "".join(f"\\{c}" if c in "`<>[]|" else c if c.isprintable() else "?" for c in text)
