"""One step of decoding: the last query against the keys of all tokens, as in generation with a cache.

Generation goes from layer to layer, so a layer's keys and values have left the processor's caches when its turn comes
again. As many layers are timed in turn as hold `AWAY` bytes; times are those of one. A mechanism is given the codes of
the keys that it would have kept since their tokens were read, if it makes any.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.base import Attended, Call, KeyCodes, Mechanism
from thresher.bench.inputs import Inputs, keep_share, random_inputs
from thresher.bench.jobs import Job, Scene, build
from thresher.bench.measure import machine, set_up, share, times
from thresher.bench.timing import Clock, interleaved

AWAY = 2**28  # bytes of keys and values, more than caches hold

Layer = tuple[Inputs, KeyCodes | None]


@torch.no_grad()
def measured(job: Job, scene: Scene) -> dict[str, Any]:
    """Return the numbers of a row."""
    set_up(scene)
    mechanism = build(job, scene.heads, scene.head_dim).to(scene.device).eval()
    inputs = _inputs(job, scene)
    if job.kept is not None:
        keep_share(mechanism, inputs[0].q, inputs[0].k, Call(), job.kept)
    layers = [(layer, mechanism.codes_of(layer.k)) for layer in inputs]
    row: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": machine(scene)}
    (out, cost), wanted = attend(mechanism, *layers[0]), dense(inputs[0].double())
    row["rel_error"] = float((out.float() - wanted.float()).norm() / wanted.float().norm())
    row |= {"kept": share(cost.kept, cost.visible), "mac_ratio": share(cost.total, cost.dense)}
    clock = Clock(scene.device)
    passes = {
        ("", "forward"): partial(_one_pass, partial(attend, mechanism), layers, clock),
        ("dense_", "forward"): partial(_one_pass, dense, layers, clock),
    }
    return row | times(interleaved(passes, scene.repetitions, scene.seconds))


def attend(mechanism: Mechanism, layer: Inputs, codes: KeyCodes | None) -> Attended:
    """Attend with the last query by a mechanism."""
    attended: Attended = mechanism(layer.q, layer.k, layer.v, Call(codes=codes))
    return attended


def dense(layer: Inputs, _: KeyCodes | None = None) -> Tensor:
    """Attend with the last query by PyTorch's own kernel."""
    return F.scaled_dot_product_attention(layer.q, layer.k, layer.v)


@torch.no_grad()
def _one_pass(attending: Callable[..., object], layers: Sequence[Layer], clock: Clock) -> Sequence[float]:
    start = clock.now()
    for layer, codes in layers:
        attending(layer, codes)
    return ((clock.now() - start) / len(layers),)


def _inputs(job: Job, scene: Scene) -> list[Inputs]:
    size = 2 * scene.batch * scene.heads * job.n * scene.head_dim * scene.torch_dtype.itemsize
    scenes = [replace(scene, seed=scene.seed + index) for index in range(-(-AWAY // size))]
    drawn = (random_inputs(each, job.n, scene.batch, scene.heads, False) for each in scenes)
    return [layer._replace(q=layer.q[:, :, -1:].contiguous()) for layer in drawn]
