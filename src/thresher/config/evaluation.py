"""Read the command line of eval.py: parsed once, and checked before anything heavy is imported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thresher.config import overrides
from thresher.config.overrides import Override

KEYS = ("ckpt", "adapter", "run.dir", "explain", "explain.example")  # others belong to the stored config

WHICH = "which checkpoint? python eval.py ckpt=runs/.../checkpoints/best.ckpt [overrides]"


@dataclass(frozen=True)
class EvaluationRequest:
    """A parsed command line of eval.py.

    Attributes:
        path: The checkpoint, the folder of a run or of an export, or None.
        adapter: The folder of an adapter, or its name on the hub, or None.
        folder: Where results go, or None for a new folder in that of the run.
        examples: Places in the test data of the examples to explain.
        experiment: The experiment that drops mechanisms in, or None.
        overrides: The overrides of the stored config, or of the experiment.
        conf: The folder of the configs.
    """

    path: Path | None
    adapter: str | None
    folder: Path | None
    examples: tuple[int, ...]
    experiment: str | None
    overrides: tuple[Override, ...]
    conf: Path

    @property
    def checkpoint(self) -> Path:
        """What `ckpt=` names.

        Raises:
            ValueError: The command line names none.
        """
        if self.path is None:
            raise ValueError(WHICH)
        return self.path


def read_request(arguments: Sequence[str], conf: Path) -> EvaluationRequest:
    """Read the command line of eval.py.

    Raises:
        ValueError: An argument is no override, names no choice of its group, or asks for examples that cannot be.
    """
    given = overrides.parse(arguments)
    for override in given:
        if overrides.is_group(conf, override.key_or_group) and not override.is_sweep_override():
            for choice in overrides.list_chosen(conf, override):
                overrides.check_choice(conf, override.key_or_group, choice)
    if swept := [o.key_or_group for o in given if o.key_or_group in KEYS and o.is_sweep_override()]:
        raise ValueError(f"eval.py takes one value for {swept[0]}; call it once for each")
    own = {o.key_or_group: o.value() for o in given if o.key_or_group in KEYS}
    if "ckpt" in own and not own["ckpt"]:
        raise ValueError(WHICH)
    experiments = [o for o in given if o.key_or_group == "experiment"]
    if own.get("adapter") and (experiments or any(o.key_or_group.partition(".")[0] == "attention" for o in given)):
        raise ValueError("adapter=FOLDER brings its own mechanisms: leave out attention and experiment")
    return EvaluationRequest(
        path=Path(str(own["ckpt"])) if own.get("ckpt") else None,
        adapter=str(own["adapter"]) if own.get("adapter") else None,
        folder=Path(str(own["run.dir"])) if own.get("run.dir") else None,
        examples=tuple(read_examples(own)),
        experiment=str(experiments[-1].value()) if experiments else None,
        overrides=tuple(o for o in given if o.key_or_group not in KEYS),
        conf=conf,
    )


def read_examples(options: Mapping[str, Any]) -> list[int]:
    """Read the indices of test examples that `explain` and `explain.example` name; none without them.

    Raises:
        ValueError: They contradict each other, or are no places.
    """
    on, example = options.get("explain", "explain.example" in options), options.get("explain.example", 0)
    if not isinstance(on, bool):
        raise ValueError(f"explain is true or false, not {on!r}; explain.example=3 chooses an example")
    if not on:
        if "explain.example" in options:
            raise ValueError("explain=false and explain.example contradict each other: leave one out")
        return []
    places = example if isinstance(example, list) else [example]
    if not places or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in places):
        raise ValueError(
            f"explain.example is a place in the test data from 0, or a list such as [0,7]; got {example!r}"
        )
    return list(dict.fromkeys(places))
