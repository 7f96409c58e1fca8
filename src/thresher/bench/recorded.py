"""Queries, keys and values of a trained network, recorded on validation data: scores as they are, not noise.

All layers that attend in one pattern stand beside each other, as heads of one call; so do their trained thresholds. The
longest examples of a batch are taken and cropped to the shortest of them, so that no padding is left; none is repeated.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from thresher import cli
from thresher.attention.base import Call, Mechanism
from thresher.attention.functional import expand_heads
from thresher.attention.thresholds import Thresholded
from thresher.checkpoint import RECORD, load_weights


class Heard(NamedTuple):
    """What one attention module was called with."""

    mechanism: Mechanism
    q: Tensor
    k: Tensor
    v: Tensor
    call: Call


def record(checkpoint_path: Path, conf: Path, file: Path, examples: int, seed: int) -> dict[str, Any]:
    """Run the network of a checkpoint on its validation data, and write down what its attention is called with.

    Returns:
        `shapes` (batch, heads, tokens, head_dim) and `lengths` (tokens) by pattern, and the config of its `attention`.

    Raises:
        ValueError: The checkpoint cannot be trusted, or its attention has pair masks or biases.
        FileNotFoundError: There is no checkpoint, or its data are not there.
    """
    torch.manual_seed(seed)
    cli.quiet_lightning()
    cfg, checkpoint, _ = cli.rebuilt(checkpoint_path, [], conf)
    data = cli.data_of(cfg, checkpoint[RECORD]["classes"])
    task = cli.build_task(cfg, data)
    load_weights(task, checkpoint["state_dict"], other_attention=False)
    heard = listen(task.eval(), lambda: task.step(next(iter(data.val_dataloader()))))
    patterns = list(dict.fromkeys(h.mechanism.pattern for h in heard))
    found = {
        p.name.lower(): beside_each_other([h for h in heard if h.mechanism.pattern is p], examples) for p in patterns
    }
    torch.save(found, file)
    return {
        "shapes": {name: tuple(x["q"].shape) for name, x in found.items()},
        "lengths": {name: min(x["q"].shape[2], x["k"].shape[2]) for name, x in found.items()},
        "attention": cli.plain_config(cfg)["attention"],
    }


@torch.no_grad()
def listen(net: nn.Module, run: Any) -> list[Heard]:
    """Return what every mechanism of a network was called with, in the order of the calls."""
    heard: list[Heard] = []

    def hear(mechanism: nn.Module, arguments: tuple[Tensor, Tensor, Tensor, Call]) -> None:
        assert isinstance(mechanism, Mechanism)
        heard.append(Heard(mechanism, *arguments))

    handles = [m.register_forward_pre_hook(hear) for m in net.modules() if isinstance(m, Mechanism)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return heard


def beside_each_other(heard: list[Heard], examples: int) -> Mapping[str, Any]:
    """Put the calls of several layers into one, layer by layer along its heads.

    Raises:
        ValueError: They have pair masks or biases, padding on the left, or heads of different sizes.
    """
    first = heard[0]
    if any(h.call.pairs is not None or h.call.bias is not None for h in heard):
        raise ValueError("its attention has pair masks or biases, which a plain call cannot stand for")
    if len({(h.q.shape[2:], h.k.shape[2:], h.v.shape[3]) for h in heard}) > 1:
        raise ValueError("its layers attend to different numbers of tokens or have heads of different sizes")
    chosen, n = longest(first.call.queries, first.q, examples)
    chosen, m = longest(first.call.keys, first.k, examples, None if first.call.queries is None else chosen)
    sides = {"q": n, "k": m, "v": m}
    sound = {
        name: torch.cat([expand_heads(getattr(h, name), h.mechanism.num_heads)[chosen, :, :length] for h in heard], 1)
        for name, length in sides.items()
    }
    thresholds = [h.mechanism.thresholds.state_dict() for h in heard if isinstance(h.mechanism, Thresholded)]
    joined = {
        name: torch.cat([state[name] for state in thresholds]) if x.ndim else x
        for name, x in (thresholds[0] if thresholds else {}).items()
    }
    return {name: x.contiguous() for name, x in sound.items()} | {"thresholds": joined or None}


def longest(seen: Tensor | None, x: Tensor, examples: int, chosen: Tensor | None = None) -> tuple[Tensor, int]:
    """Return the examples with the most visible tokens, or those chosen, and how many tokens all of these have.

    Raises:
        ValueError: There are not as many examples, or padding is not on the right.
    """
    if len(x) < examples:
        raise ValueError(f"bench.batch={examples}: a validation batch has {len(x)} examples")
    if seen is None:
        return torch.arange(examples) if chosen is None else chosen, x.shape[2]
    counts = seen.sum(1)
    if not torch.equal(seen, torch.arange(seen.shape[1]) < counts[:, None]):
        raise ValueError("its padding is not on the right, so that it cannot be cropped")
    chosen = counts.argsort(descending=True, stable=True)[:examples] if chosen is None else chosen
    return chosen, int(counts[chosen].min())
