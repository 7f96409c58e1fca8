"""One export, from a run's folder to a folder of files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from thresher import exported
from thresher.checkpoint import RECORD, load
from thresher.export.card import card
from thresher.loading import PROJECT_CONF, checkpoint_of, network
from thresher.secrets import redacted
from thresher.trust import PARTS

KEPT = (*PARTS, "seed")  # what rebuilding and testing read of a config


def export(run: Path, out: str | None, kind: str, conf: Path = PROJECT_CONF) -> Path:
    """Write the network of a run into a folder; return that folder.

    Args:
        run: Folder of a run, or a checkpoint.
        out: Where to write, a folder that is empty or does not exist; None for `export` in the folder of the run.
        kind: "safetensors", or besides that "torch" for torch.export's program, or "onnx".
        conf: Folder of configs.

    Raises:
        FileNotFoundError: There is no such run.
        ValueError: The checkpoint is damaged or not ours, the folder is not empty, or the network cannot be exported.
    """
    source = checkpoint_of(run)
    home = source.parent.parent if source.parent.name == "checkpoints" else source.parent
    folder = Path(out) if out else home / "export"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: name another by out=DIR, or remove it")
    checkpoint = load(source)
    net = network(checkpoint, conf, source)
    whole = checkpoint[RECORD]
    name = str((whole["config"].get("run") or {}).get("name") or home.name)
    config = {key: value for key, value in whole["config"].items() if key in KEPT} | {"run": {"name": name}}
    record = {
        "version": str(whole.get("version", "")),
        "config": redacted(config),
        "classes": whole["classes"],
        "model_arguments": whole["model_arguments"],
    }
    programs: dict[str, str] = {}
    folder.mkdir(parents=True, exist_ok=True)
    if kind != "safetensors":
        from thresher.export.programs import write_program

        programs = write_program(net, record["model_arguments"], folder, kind)
    exported.write(folder, net.state_dict(), record)
    text = card(name, record, _metrics(home), _command(whole["config"], conf), programs)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


def _metrics(home: Path) -> dict[str, float | None] | None:
    path = home / "metrics.json"
    if not path.is_file():
        return None
    try:
        metrics: dict[str, float | None] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return metrics


def _command(config: Mapping[str, Any], conf: Path) -> str:
    """Return the command that trains a network of this config."""
    from thresher.report.commands import Commands
    from thresher.report.configs import read_config
    from thresher.report.runs import Run

    plain = OmegaConf.to_yaml(OmegaConf.create(redacted(dict(config))))
    return Commands(conf).of(Run(Path(), "", read_config(plain)))
