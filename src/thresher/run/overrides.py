"""Apply the overrides of an evaluation to the config of a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

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
    for override in sorted(given, key=lambda o: not overrides.is_group(conf, o.key_or_group)):
        _apply(config, override, conf)
    other = bool(config.attention["_target_"] != trained)
    places = [place.partition("@")[2] for place in overrides.list_places(conf)]
    for place in places if other else ():  # another mechanism takes all places
        if OmegaConf.select(config, place) is not None:
            OmegaConf.update(config, place, None)
    initial = {f"{place}.{key}" for place in ("attention", *places) for key in INITIAL}
    for override in given:
        if override.key_or_group in initial and not other:
            raise ValueError(f"{override.key_or_group} is a starting value: the checkpoint's own thresholds are used")
    return Rebuilt(config, checkpoint, other)


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
