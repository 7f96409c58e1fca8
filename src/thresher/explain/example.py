"""Write the attention maps of selected test examples, for every head of every layer."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from thresher.attention.maps import find_kept_pairs
from thresher.attention.mechanism import Mechanism
from thresher.attention.registry import name_of
from thresher.attention.shared.thresholds import named_thresholds
from thresher.explain.description import Description, describe_example, find_sides
from thresher.explain.effective import effective_attention
from thresher.explain.files import write_example
from thresher.explain.maps import RecordedCall, record_calls, recover_map

MAX_KEYS = 2048  # of a readable map


class ExplainableTask(Protocol):
    """A task whose network can be explained."""

    net: nn.Module

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        ...

    def step(self, batch: Any) -> Any:
        """Run the network on a batch; the result has `predictions`."""
        ...


def explain(task: ExplainableTask, data: Any, examples: Sequence[int], folder: Path) -> list[Path]:
    """Write the attention maps of test examples, one at a time; return the files.

    Args:
        task: The network and its step.
        data: Source of the examples.
        examples: Their indices in the test data.
        folder: Folder of the files.

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
        inputs, targets = (_move(part, device) for part in batch)
        with torch.no_grad(), record_calls(net) as calls:
            predictions = task.step((inputs, targets)).predictions
        description = describe_example(data, net, inputs)
        names = _name_calls(calls)
        described = [_describe_layer(name, call, description) for name, call in zip(names, calls, strict=True)]
        layers, arrays = zip(*described, strict=True)
        example = {
            "example": place,
            **_name_classes(data.class_names, predictions, targets),
            "texts": description.texts,
            "picture": None if description.picture is None else list(description.picture.shape),
            "grid": description.grid and list(description.grid),
            "layers": list(layers),
        }
        files += write_example(folder, example, description, list(arrays))
    for module, training in modes.items():  # parents first: each call sets all modules below
        module.train(training)
    return files


def _move(part: Any, device: torch.device) -> Any:
    return part.to(device) if isinstance(part, Tensor) else tuple(x.to(device) for x in part)


def _name_calls(calls: Sequence[RecordedCall]) -> list[str]:
    """Name each call by its module; further calls of a module get a number."""
    names: list[str] = []
    for call in calls:
        name = call.name.removesuffix(".mechanism")
        again = sum(other.name == call.name for other in calls[: len(names)])
        names.append(f"{name} ({again + 1})" if again else name)
    return names


def _describe_layer(
    name: str, recorded: RecordedCall, description: Description
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Describe one call: facts about each head, and its maps as arrays."""
    if recorded.k.shape[2] > MAX_KEYS:
        raise ValueError(
            f"{name} attends to {recorded.k.shape[2]:,} keys; explain shows maps of {MAX_KEYS:,} at most: shorten the "
            "example by data.length, data.context or data.image_size"
        )
    map_ = recover_map(recorded)
    weights, visible = map_.weights[0], map_.visible[0]
    kept = find_kept_pairs(recorded.mechanism, recorded.q, recorded.k, recorded.v, recorded.call)[0]
    effective = effective_attention(weights, map_.values[0], visible)
    cost, mechanism = recorded.attended.cost, recorded.mechanism
    thresholds = _list_thresholds(mechanism)
    queries, keys = find_sides(description, mechanism.pattern, *weights.shape[1:])
    about = {
        "name": name,
        "attention": name_of(type(mechanism)),
        "pattern": mechanism.pattern.name.lower(),
        "queries": queries,
        "keys": keys,
        "error": map_.error,
        "sampled_values": map_.expected,
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
    arrays = {"weights": weights, "effective": effective.weights, "kept": kept & visible}
    return about, {key: value.cpu().numpy() for key, value in arrays.items()}


def _list_thresholds(mechanism: Mechanism) -> list[float | None]:
    for _, thresholds in named_thresholds(mechanism):
        return [float(t) if math.isfinite(t) else None for t in thresholds.values().detach()]
    return [None] * mechanism.num_heads


def _name_classes(names: Sequence[str], predictions: Tensor, targets: Any) -> dict[str, str | None]:
    """Name the true and the predicted class of an example, if there are classes."""
    if not names:
        return {"label": None, "predicted": None}
    return {"label": names[int(targets[0])], "predicted": names[int(predictions[0].argmax())]}
