"""Queries, keys and values of a trained network, recorded on validation data: real scores rather than noise.

The layers of one pattern are joined as the heads of one call, with their trained thresholds. The longest examples of a
batch are cropped to the shortest of them, so that no padding is left; no example is repeated.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from thresher.attention.contract import Call
from thresher.attention.mechanism import Mechanism
from thresher.attention.shared.functional import expand_heads
from thresher.attention.shared.thresholds import Thresholded
from thresher.checkpoints.format import CLASSES, RECORD, STATE
from thresher.checkpoints.weights import load_weights
from thresher.run.build import build_data, build_task, quiet_lightning
from thresher.run.overrides import load_with_overrides
from thresher.run.run import resolve_config


class RecordedCall(NamedTuple):
    """The arguments of one call of a mechanism."""

    mechanism: Mechanism
    q: Tensor
    k: Tensor
    v: Tensor
    call: Call


def record_inputs(checkpoint_path: Path, conf: Path, file: Path, examples: int, seed: int) -> dict[str, Any]:
    """Run the network of a checkpoint on a validation batch, and write the arguments of its attention to a file.

    Returns:
        `shapes` (batch, heads, tokens, head_dim) and `lengths` (tokens) by pattern, and the config of its `attention`.

    Raises:
        ValueError: The checkpoint cannot be trusted, or its attention has pair masks or biases.
        FileNotFoundError: There is no checkpoint, or its data are not there.
    """
    torch.manual_seed(seed)
    quiet_lightning()
    cfg, checkpoint, _ = load_with_overrides(checkpoint_path, [], conf)
    data = build_data(cfg, checkpoint[RECORD][CLASSES])
    task = build_task(cfg, data)
    load_weights(task, checkpoint[STATE], other_attention=False)
    calls = record_calls(task.eval(), lambda: task.step(next(iter(data.val_dataloader()))))
    patterns = list(dict.fromkeys(h.mechanism.pattern for h in calls))
    found = {p.name.lower(): join_layers([h for h in calls if h.mechanism.pattern is p], examples) for p in patterns}
    torch.save(found, file)
    return {
        "shapes": {name: tuple(x["q"].shape) for name, x in found.items()},
        "lengths": {name: min(x["q"].shape[2], x["k"].shape[2]) for name, x in found.items()},
        "attention": resolve_config(cfg)["attention"],
    }


@torch.no_grad()
def record_calls(net: nn.Module, run: Any) -> list[RecordedCall]:
    """Record the calls of every mechanism in a network, in their order."""
    calls: list[RecordedCall] = []

    def hear(mechanism: nn.Module, arguments: tuple[Tensor, Tensor, Tensor, Call]) -> None:
        assert isinstance(mechanism, Mechanism)
        calls.append(RecordedCall(mechanism, *arguments))

    handles = [m.register_forward_pre_hook(hear) for m in net.modules() if isinstance(m, Mechanism)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def join_layers(calls: list[RecordedCall], examples: int) -> Mapping[str, Any]:
    """Join the calls of several layers along the heads.

    Raises:
        ValueError: They have pair masks or biases, padding on the left, or heads of different sizes.
    """
    first = calls[0]
    if any(h.call.pairs is not None or h.call.bias is not None for h in calls):
        raise ValueError("its attention has pair masks or biases, which bench cannot replay")
    if len({(h.q.shape[2:], h.k.shape[2:], h.v.shape[3]) for h in calls}) > 1:
        raise ValueError("its layers attend to different numbers of tokens or have heads of different sizes")
    chosen, n = choose_longest(first.call.queries, first.q, examples)
    chosen, m = choose_longest(first.call.keys, first.k, examples, None if first.call.queries is None else chosen)
    sides = {"q": n, "k": m, "v": m}
    tensors = {
        name: torch.cat([expand_heads(getattr(h, name), h.mechanism.num_heads)[chosen, :, :length] for h in calls], 1)
        for name, length in sides.items()
    }
    thresholds = [h.mechanism.thresholds.state_dict() for h in calls if isinstance(h.mechanism, Thresholded)]
    joined = {
        name: torch.cat([state[name] for state in thresholds]) if x.ndim else x
        for name, x in (thresholds[0] if thresholds else {}).items()
    }
    return {name: x.contiguous() for name, x in tensors.items()} | {"thresholds": joined or None}


def choose_longest(seen: Tensor | None, x: Tensor, examples: int, chosen: Tensor | None = None) -> tuple[Tensor, int]:
    """Choose the examples with the most visible tokens, unless `chosen` is given; return also their common length.

    Raises:
        ValueError: There are not as many examples, or padding is not on the right.
    """
    if len(x) < examples:
        raise ValueError(f"batch={examples}: a validation batch has {len(x)} examples")
    if seen is None:
        return torch.arange(examples) if chosen is None else chosen, x.shape[2]
    counts = seen.sum(1)
    if not torch.equal(seen, torch.arange(seen.shape[1]) < counts[:, None]):
        raise ValueError("its padding is not on the right, so it cannot be cropped")
    chosen = counts.argsort(descending=True, stable=True)[:examples] if chosen is None else chosen
    return chosen, int(counts[chosen].min())
