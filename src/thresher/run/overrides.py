"""Apply the overrides of an evaluation to the config of a checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from thresher.attention.shared.thresholds import IN_SPREADS
from thresher.checkpoints.format import STATE
from thresher.checkpoints.load import load_checkpoint
from thresher.checkpoints.rebuild import rebuild_config
from thresher.config import overrides
from thresher.config.overrides import Override

REPLACEABLE = ("attention", "data", "trainer")  # groups that another choice can stand in for
READ = (*REPLACEABLE, "model", "task")  # groups that an evaluation reads
INITIAL = ("threshold", "gate.tau", "trainable")  # options of a mechanism that are starting values of its training


class Rebuilt(NamedTuple):
    """A checkpoint, and what an evaluation builds of it.

    Attributes:
        config: Its config, with the overrides applied.
        checkpoint: The checkpoint.
        other_attention: Whether another mechanism takes the place of the trained one.
    """

    config: DictConfig
    checkpoint: dict[str, Any]
    other_attention: bool


def load_with_overrides(path: Path, given: Sequence[Override], conf: Path) -> Rebuilt:
    """Load a checkpoint, rebuild its config and apply overrides: groups first, then values.

    Raises:
        ValueError: An override is wrong, or the checkpoint cannot be read or trusted.
        FileNotFoundError: There is no such checkpoint.
    """
    checkpoint = load_checkpoint(path)
    config = rebuild_config(checkpoint, conf, path)
    trained = config.attention["_target_"]
    places = [place.partition("@")[2] for place in overrides.list_places(conf)]
    units = _find_units(config, ["attention", *places], checkpoint[STATE])
    for override in sorted(given, key=lambda o: not overrides.is_group(conf, o.key_or_group)):
        _apply(config, override, conf)
    other = bool(config.attention["_target_"] != trained)
    for place in places if other else ():  # another mechanism takes all places
        if OmegaConf.select(config, place) is not None:
            OmegaConf.update(config, place, None)
    initial = {f"{place}.{key}" for place in ("attention", *places) for key in INITIAL}
    for override in given:
        if override.key_or_group in initial and not other:
            raise ValueError(f"{override.key_or_group} is a starting value: the checkpoint's own thresholds are used")
    for key, unit in ({} if other else units).items():
        if OmegaConf.select(config, key) != unit and key in [override.key_or_group for override in given]:
            raise ValueError(
                f"{key}={OmegaConf.select(config, key)}: the thresholds of the checkpoint count in {unit}, and mean "
                f"nothing in another unit; leave {key} out"
            )
        OmegaConf.update(config, key, unit)
    return Rebuilt(config, checkpoint, other)


def _find_units(config: DictConfig, places: Sequence[str], state: Mapping[str, Tensor]) -> dict[str, str]:
    """Find the unit of the thresholds of each place, by its key; that of the state, which a tuning may have chosen.

    Where the state has several, no tuning has chosen one, and the config says which place has which.
    """
    if not any(name.endswith(".thresholds.base") for name in state):
        return {}
    stored = {bool(value) for name, value in state.items() if name.endswith(f".{IN_SPREADS}")}
    chosen = ("spread" if stored.pop() else "nats") if len(stored) == 1 else None
    configured = {
        f"{place}.unit": OmegaConf.select(config, f"{place}.unit") for place in places if not _follows(config, place)
    }
    return {key: chosen or unit for key, unit in configured.items() if unit is not None}


def _follows(config: DictConfig, place: str) -> bool:
    """Tell whether a place has no mechanism of its own but that of the run."""
    parent, _, name = place.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return isinstance(node, DictConfig) and name in node and OmegaConf.is_interpolation(node, name)


def _apply(config: DictConfig, override: Override, conf: Path) -> None:
    """Apply one override to a stored config: a choice of a group, or a value."""
    key = override.key_or_group
    if override.is_sweep_override():
        raise ValueError(f"eval.py takes one value for {key}; call it once for each")
    if override.is_delete():
        raise ValueError(f"eval.py cannot delete {key}: a checkpoint is rebuilt as a whole")
    if overrides.is_group(conf, key):
        if override.package:
            raise ValueError(
                f"eval.py replaces {key} as a whole, by {key}=...; {override.get_key_element()} is trained"
            )
        if key not in REPLACEABLE:
            raise ValueError(f"eval.py can replace {', '.join(REPLACEABLE)}; {key} is part of what was trained")
        config[key] = overrides.compose_choice(conf, key, str(override.value()))
        return
    if not override.is_add():
        overrides.check_key(config, key)
        overrides.check_type(config, key, override.value())
    if key.partition(".")[0] not in READ:
        raise ValueError(f"{key} has no effect on an evaluation; what has is in {', '.join(READ)}, ckpt and run.dir")
    if key == "model.pretrained":
        raise ValueError(f"{key} has no effect on an evaluation: the checkpoint has the weights")
    OmegaConf.update(config, key, override.value(), force_add=override.is_add())
