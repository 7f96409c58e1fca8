"""Explain mode: attention maps of chosen test examples, for every head of every layer, into files."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from thresher.attention.base import Mechanism
from thresher.attention.thresholds import Thresholds
from thresher.explain.effective import effective_attention
from thresher.explain.files import write_example
from thresher.explain.maps import Recorded, attention_map, recorded_calls
from thresher.explain.shown import Shown, shown_example, sides

LONGEST = 2048  # keys of a map that somebody could look at


def wanted_examples(options: dict[str, Any]) -> list[int]:
    """Return the places in the test data that `explain` and `explain.example` ask for; none without them.

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


class Explained(Protocol):
    """What can be explained: a task."""

    net: nn.Module

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        ...

    def step(self, batch: Any) -> Any:
        """Run the network on a batch; what it returns has `predictions`."""
        ...


def explain(task: Explained, data: Any, examples: Sequence[int], folder: Path) -> list[Path]:
    """Write the attention maps of test examples, each by itself; return the files.

    Args:
        task: The network and how it is run.
        data: Where the examples come from.
        examples: Their places in the test data.
        folder: Where the files go.

    Raises:
        ValueError: There is no such example, or something in the network has no attention map.
    """
    data.setup("test")
    loader = data.test_dataloader()
    if beyond := [i for i in examples if i >= len(loader.dataset)]:
        raise ValueError(f"explain.example={beyond[0]}, but the test data have {len(loader.dataset)} examples, from 0")
    net, device = task.net, task.device
    modes = {module: module.training for module in net.modules()}
    net.eval()
    files = []
    one_by_one = DataLoader(Subset(loader.dataset, list(examples)), batch_size=1, collate_fn=loader.collate_fn)
    for place, batch in zip(examples, one_by_one, strict=True):
        inputs, targets = (_to(part, device) for part in batch)
        with torch.no_grad(), recorded_calls(net) as calls:
            predictions = task.step((inputs, targets)).predictions
        shown = shown_example(data, net, inputs)
        names = _names(calls)
        layers, arrays = zip(*(_layer(name, call, shown) for name, call in zip(names, calls, strict=True)), strict=True)
        example = {
            "example": place,
            **_classes(data.class_names, predictions, targets),
            "texts": shown.texts,
            "picture": None if shown.picture is None else list(shown.picture.shape),
            "grid": shown.grid and list(shown.grid),
            "layers": list(layers),
        }
        files += write_example(folder, example, shown, list(arrays))
    for module, training in modes.items():
        module.training = training
    return files


def _to(part: Any, device: torch.device) -> Any:
    return part.to(device) if isinstance(part, Tensor) else tuple(x.to(device) for x in part)


def _names(calls: Sequence[Recorded]) -> list[str]:
    """Name each call by its module; a module that is called again gets a number."""
    names: list[str] = []
    for call in calls:
        name = call.name.removesuffix(".mechanism")
        again = sum(other.name == call.name for other in calls[: len(names)])
        names.append(f"{name} ({again + 1})" if again else name)
    return names


def _layer(name: str, recorded: Recorded, shown: Shown) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what one call kept and weighed, in words and in numbers."""
    if recorded.k.shape[2] > LONGEST:
        raise ValueError(
            f"{name} attends to {recorded.k.shape[2]:,} keys; explain shows maps of {LONGEST:,} at most: shorten the "
            "example by data.length, data.context or data.image_size"
        )
    found = attention_map(recorded)
    weights, visible = found.weights[0], found.visible[0]
    effective = effective_attention(weights, found.values[0], visible)
    cost, mechanism = recorded.attended.cost, recorded.mechanism
    thresholds = _thresholds(mechanism)
    queries, keys = sides(shown, mechanism.pattern, *weights.shape[1:])
    about = {
        "name": name,
        "attention": type(mechanism).__module__.rpartition(".")[2],
        "pattern": mechanism.pattern.name.lower(),
        "queries": queries,
        "keys": keys,
        "error": found.error,
        "sampled_values": found.expected,
        "heads": [
            {
                "threshold": thresholds[head],
                "kept": float(cost.kept[0, head] / cost.visible[0, head].clamp_min(1)),
                "visible": int(visible[head].sum()),
                "nonzero": int((weights[head] != 0).sum()),
                "ineffective": float(effective.ineffective[head]),
                "rank": effective.rank[head],
            }
            for head in range(len(weights))
        ],
    }
    arrays = {"weights": weights, "effective": effective.weights, "kept": (weights != 0) & visible}
    return about, {key: value.cpu().numpy() for key, value in arrays.items()}


def _thresholds(mechanism: Mechanism) -> list[float | None]:
    for module in mechanism.modules():
        if isinstance(module, Thresholds):
            return [float(t) if math.isfinite(t) else None for t in module.values().detach()]
    return [None] * mechanism.num_heads


def _classes(names: Sequence[str], predictions: Tensor, targets: Any) -> dict[str, str | None]:
    """Return the class of an example and the one that the network takes it for, where there are classes."""
    if not names:
        return {"label": None, "predicted": None}
    return {"label": names[int(targets[0])], "predicted": names[int(predictions[0].argmax())]}
