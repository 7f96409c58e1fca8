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
from thresher.tools.export.card import write_card

KEPT = (*GROUPS, "seed")  # what rebuilding and testing read of a config


def export(run: Path, into: str | None, kind: str, conf: Path = PROJECT_CONF) -> Path:
    """Write the network of a run into a folder; return that folder.

    Args:
        run: Folder of a run, or a checkpoint.
        into: Where to write, a folder that is empty or does not exist; None for `export` in the folder of the run.
        kind: "safetensors"; "torch" adds the program of torch.export, "onnx" adds ONNX.
        conf: Folder of configs.

    Raises:
        FileNotFoundError: There is no such run.
        ValueError: The checkpoint is damaged or not trusted, the folder is not empty, or the exporter fails.
    """
    source = find_checkpoint(run)
    home = source.parent.parent if source.parent.name == "checkpoints" else source.parent
    folder = Path(into) if into else home / "export"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: name another by run.dir=DIR, or remove it")
    checkpoint = load_checkpoint(source)
    net = rebuild_network(checkpoint, conf, source)
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
    text = write_card(name, record, _read_metrics(home), _write_command(whole["config"], conf, source), programs)
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


def _write_command(config: Mapping[str, Any], conf: Path, source: Path) -> str:
    """Write the command that trains a network of this config."""
    from thresher.results.commands import CommandWriter
    from thresher.results.configs import read_config
    from thresher.results.runs import Run

    plain = OmegaConf.to_yaml(OmegaConf.create(restore_config(config, conf, source)))
    return CommandWriter(conf).write(Run(Path(), "", read_config(plain)))
