"""One step of decoding: the last query against the keys of all tokens, as in generation with a cache.

Generation visits all layers for each token, so the keys and values of a layer have left the processor's caches when it
is called again. Enough layers to hold `AWAY` bytes are timed in turns; the times are those of one layer. A mechanism
that reads codes of keys, or sums for a tail, gets them ready-made, as from a cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from thresher.attention.contract import Attended, Call
from thresher.attention.mechanism import Mechanism
from thresher.attention.shared.sums import RunningSums
from thresher.testing.inputs import Inputs, cast
from thresher.tools.bench.inputs import calibrate_to_share, draw_inputs
from thresher.tools.bench.jobs import Job, Scene, build_mechanism
from thresher.tools.bench.measure import compute_share, describe_machine, prepare_process, summarise_times
from thresher.tools.bench.timing import Clock, time_interleaved

AWAY = 2**28  # bytes of keys and values, more than caches hold

Layer = tuple[Inputs, Call]


@torch.no_grad()
def measure_decoding(job: Job, scene: Scene) -> dict[str, Any]:
    """Measure one row of decoding."""
    prepare_process(scene)
    mechanism = build_mechanism(job, scene.heads, scene.head_dim).to(scene.device).eval()
    inputs = _draw_layers(job, scene)
    if job.kept is not None:
        calibrate_to_share(mechanism, inputs[0].q, inputs[0].k, Call(), job.kept)
    layers = [(layer, _read_cache(mechanism, layer)) for layer in inputs]
    row: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": describe_machine(scene),
    }
    (out, cost, _), wanted = attend_last(mechanism, *layers[0]), attend_last_densely(cast(inputs[0], torch.float64))
    row["rel_error"] = float((out.float() - wanted.float()).norm() / wanted.float().norm())
    row |= {"kept": compute_share(cost.kept, cost.visible), "mac_ratio": compute_share(cost.total, cost.dense)}
    clock = Clock(scene.device)
    passes = {
        ("", "forward"): partial(_one_pass, partial(attend_last, mechanism), layers, clock),
        ("dense_", "forward"): partial(_one_pass, attend_last_densely, layers, clock),
    }
    return row | summarise_times(time_interleaved(passes, scene.repetitions, scene.seconds))


def attend_last(mechanism: Mechanism, layer: Inputs, call: Call) -> Attended:
    """Attend with the last query, by a mechanism."""
    attended: Attended = mechanism(layer.q, layer.k, layer.v, call)
    return attended


def attend_last_densely(layer: Inputs, _: Call | None = None) -> Tensor:
    """Attend with the last query, by PyTorch's own kernel."""
    return F.scaled_dot_product_attention(layer.q, layer.k, layer.v)


@torch.no_grad()
def _one_pass(attending: Callable[..., object], layers: Sequence[Layer], clock: Clock) -> Sequence[float]:
    start = clock.now()
    for layer, call in layers:
        attending(layer, call)
    return ((clock.now() - start) / len(layers),)


def _read_cache(mechanism: Mechanism, layer: Inputs) -> Call:
    sums = RunningSums()
    sums.read(layer.k, layer.v, None)
    return Call(codes=mechanism.encode_keys(layer.k), sums=sums)


def _draw_layers(job: Job, scene: Scene) -> list[Inputs]:
    size = 2 * scene.batch * scene.heads * job.n * scene.head_dim * scene.torch_dtype.itemsize
    scenes = [replace(scene, seed=scene.seed + index) for index in range(-(-AWAY // size))]
    drawn = (draw_inputs(each, job.n, scene.batch, scene.heads, False) for each in scenes)
    return [replace(layer, q=layer.q[:, :, -1:].contiguous()) for layer in drawn]
