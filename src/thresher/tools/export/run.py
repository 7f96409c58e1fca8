"""Export a run: from its folder to a folder of files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from thresher.checkpoints.exports import write_export
from thresher.checkpoints.format import GROUPS, RECORD
from thresher.checkpoints.groups import restore_config
from thresher.checkpoints.load import find_checkpoint, load_checkpoint
from thresher.checkpoints.rebuild import PROJECT_CONF, rebuild_network
from thresher.config.redact import redact
from thresher.tools.export.adapted import rebuild_with_adapter
from thresher.tools.export.card import write_card

TUNED = "tune/error"  # a metric that only a tuning has
KEPT = (*GROUPS, "seed")  # what rebuilding and testing read of a config


def export(run: Path, into: str | None, kind: str, adapter: str | None = None, conf: Path = PROJECT_CONF) -> Path:
    """Write the network of a run into a folder; return that folder.

    Args:
        run: Folder of a run, or a checkpoint.
        into: Where to write, a folder that is empty or does not exist; None for `export` in the folder of the run.
        kind: "safetensors"; "torch" adds the program of torch.export, "onnx" adds ONNX.
        adapter: The folder of an adapter whose mechanisms the network has, or its name on the hub.
        conf: Folder of configs.

    Raises:
        FileNotFoundError: There is no such run or adapter.
        ValueError: The checkpoint is damaged or not trusted, the adapter does not belong to it, the folder is not
            empty, or the exporter fails.
    """
    source = find_checkpoint(run)
    home = source.parent.parent if source.parent.name == "checkpoints" else source.parent
    folder = Path(into) if into else home / "export"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: name another by run.dir=DIR, or remove it")
    checkpoint = load_checkpoint(source)
    command = _write_command(checkpoint[RECORD]["config"], conf, source)
    if adapter is None:
        net = rebuild_network(checkpoint, conf, source)
    else:
        net, checkpoint = rebuild_with_adapter(checkpoint, adapter, conf, source)
    whole = checkpoint[RECORD]
    name = str((whole["config"].get("run") or {}).get("name") or home.name)
    config = {key: value for key, value in whole["config"].items() if key in KEPT} | {"run": {"name": name}}
    record = {
        "version": str(whole.get("version", "")),
        "config": redact(config),
        "classes": whole["classes"],
        "model_arguments": whole["model_arguments"],
    }
    programs: dict[str, str] = {}
    folder.mkdir(parents=True, exist_ok=True)
    if kind != "safetensors":
        from thresher.tools.export.programs import write_program

        programs = write_program(net, record["model_arguments"], folder, kind)
    write_export(folder, net.state_dict(), record)
    metrics = _read_metrics(home) if adapter is None else _read_tuned_metrics(Path(adapter))
    text = write_card(name, record, metrics, command, programs, has_adapter=adapter is not None)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


def _read_metrics(home: Path) -> dict[str, float | None] | None:
    path = home / "metrics.json"
    if not path.is_file():
        return None
    try:
        metrics: dict[str, float | None] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return metrics


def _read_tuned_metrics(adapter: Path) -> dict[str, float | None] | None:
    """Read the metrics of the run that tuned an adapter; None where it lies elsewhere."""
    metrics = _read_metrics(adapter.parent)
    return metrics if metrics is not None and TUNED in metrics else None


def _write_command(config: Mapping[str, Any], conf: Path, source: Path) -> str:
    """Write the command that trains a network of this config."""
    from thresher.results.commands import CommandWriter
    from thresher.results.configs import read_config
    from thresher.results.runs import Run

    plain = OmegaConf.to_yaml(OmegaConf.create(restore_config(config, conf, source)))
    return CommandWriter(conf).write(Run(Path(), "", read_config(plain)))
