"""Whole training steps of a small GPT and a ViT: forward, loss, backward, optimiser; sparse and dense in turn.

The dense network is the one that a user would have without this toolkit: attention told of causality rather than handed
a mask, no meter and no budget. The sparse one pays for all of its own. In bfloat16 both train by autocast. Tokens and
images are random: a step takes as long whatever they say, and thresholds are calibrated on them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.attention.base import Attended, Call, Cost, Mechanism
from thresher.attention.dense import Dense
from thresher.attention.thresholds import Thresholded
from thresher.bench import memory
from thresher.bench.inputs import keep_share
from thresher.bench.jobs import Job, Scene, mechanism_class
from thresher.bench.measure import machine, set_up, times
from thresher.bench.timing import Clock, interleaved, spread
from thresher.compute import ComputeMeter
from thresher.hosts import densify
from thresher.models.build import timm_classifier
from thresher.models.transformer import LanguageModel

VOCABULARY, CLASSES, PATCH = 257, 10, 16
WEIGHT = 10.0  # of the squared distance to the target

Batch = tuple[Tensor, Tensor]


class Fused(Dense):
    """Dense attention of sequences without padding, by PyTorch's own kernel; what it costs is not counted."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.pattern.causal)
        uncounted = out.new_zeros(out.shape[:2])
        return Attended(out, Cost(*[uncounted] * len(Cost._fields)))


def measured(job: Job, scene: Scene) -> dict[str, Any]:
    """Return the numbers of a row."""
    set_up(scene)
    plain, sparse = networks(job, scene)
    batch = batch_of(job, scene)
    mechanisms = [m for m in sparse.modules() if isinstance(m, Mechanism)]
    row: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": machine(scene)}
    row |= {"heads": mechanisms[0].num_heads, "head_dim": mechanisms[0].head_dim, "batch": job.sizes["batch"]}
    meter = ComputeMeter(sparse)
    with torch.no_grad(), meter:
        if job.kept is not None:
            calibrate_on_the_way(mechanisms, partial(sparse, batch[0]), job.kept)
        wanted, got = plain(batch[0]).float(), sparse.eval()(batch[0]).float()
    row["rel_error"] = float((got - wanted).norm() / wanted.norm())
    sparse.train()
    dense_step, sparse_step = Step(plain, None, None, scene), Step(sparse, meter, job.kept, scene)
    if scene.memory and memory.resettable(scene.device):
        for name, step in (("peak_mb", sparse_step), ("dense_peak_mb", dense_step)):
            step(batch)
            row[name] = memory.peak_extra(partial(step, batch), scene.device)
    recorded = interleaved(
        {"sparse": partial(sparse_step, batch), "dense": partial(dense_step, batch)}, scene.repetitions, scene.seconds
    )
    row |= {"kept": float(meter.kept().detach()), "mac_ratio": float(meter.ratio().detach())}
    for name, who in (("", "sparse"), ("dense_", "dense")):
        row[f"{name}step_ms"] = spread([sum(parts) for parts in recorded[who]]).median
    row["speedup_step"] = row["dense_step_ms"] / row["step_ms"]
    return row | times(
        {(name, "forward"): [p[:1] for p in recorded[who]] for name, who in (("", "sparse"), ("dense_", "dense"))}
        | {(name, "training"): [p[:2] for p in recorded[who]] for name, who in (("", "sparse"), ("dense_", "dense"))}
    )


class Step:
    """One step of training; returns the seconds of forward with loss, of backward, and of the optimiser."""

    def __init__(self, net: nn.Module, meter: ComputeMeter | None, target: float | None, scene: Scene) -> None:
        self.net, self.meter, self.target = net, meter, target
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
        self.clock, self.scene = Clock(scene.device), scene

    def __call__(self, batch: Batch) -> Sequence[float]:
        start = self.clock.now()
        loss = self.loss(*batch)
        forward = self.clock.now()
        loss.backward()
        backward = self.clock.now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return forward - start, backward - forward, self.clock.now() - backward

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        if self.meter is None:
            return self.task_loss(x, target)
        with self.meter:
            loss = self.task_loss(x, target)
        ratio = self.meter.kept()
        return loss if self.target is None else loss + WEIGHT * (ratio - self.target) ** 2

    def task_loss(self, x: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(self.scene.device, torch.bfloat16, enabled=self.scene.dtype == "bfloat16"):
            return F.cross_entropy(self.net(x).flatten(0, -2), target.flatten())


def networks(job: Job, scene: Scene) -> tuple[nn.Module, nn.Module]:
    """Return the network as it is without this toolkit, and the same one with a mechanism."""
    backend = {} if job.backend is None else {"backend": job.backend}
    cls = mechanism_class(job.target or "")

    def make(num_heads: int, head_dim: int, pattern: Any) -> Mechanism:
        return cls(num_heads, head_dim, pattern, **job.hyperparameters, **backend)

    build: Callable[..., nn.Module] = _gpt if job.model == "gpt" else _vit
    plain, sparse = build(job, scene, Fused), build(job, scene, make)
    if job.model == "vit":
        densify(plain)
    sparse.load_state_dict(plain.state_dict(), strict=True)
    return tuple(net.to(scene.device) for net in (plain, sparse))  # type: ignore[return-value]


def _gpt(job: Job, scene: Scene, make: Any) -> nn.Module:
    width = scene.heads * scene.head_dim
    sizes = {"dim": width, "ffn_dim": 4 * width, "num_heads": scene.heads, "depth": job.sizes["depth"]}
    return LanguageModel(make, causal=True, vocabulary=VOCABULARY, length=job.n, **sizes)


def _vit(job: Job, scene: Scene, make: Any) -> nn.Module:
    side = isqrt(job.n - 1)
    if side * side != job.n - 1:
        raise ValueError(f"a ViT has a square of patches and a class token: N = 197, 785, ..., not {job.n}")
    return timm_classifier(
        attention=make, num_classes=CLASSES, channels=3, image_size=side * PATCH, name=job.sizes["name"]
    )


def batch_of(job: Job, scene: Scene) -> Batch:
    """Draw inputs and targets."""
    rng = torch.Generator().manual_seed(scene.seed)
    examples = job.sizes["batch"]
    if job.model == "gpt":
        tokens = torch.randint(1, VOCABULARY, (examples, job.n + 1), generator=rng).to(scene.device)
        return tokens[:, :-1], tokens[:, 1:]
    side = isqrt(job.n - 1) * PATCH
    images = torch.randn(examples, 3, side, side, generator=rng).to(scene.device)
    return images, torch.randint(CLASSES, (examples,), generator=rng).to(scene.device)


def calibrate_on_the_way(mechanisms: Sequence[Mechanism], run: Callable[[], object], kept: float) -> None:
    """Calibrate each mechanism on the queries and keys that reach it, first to last, in one pass."""

    def see(mechanism: nn.Module, arguments: tuple[Tensor, Tensor, Tensor, Call]) -> None:
        assert isinstance(mechanism, Mechanism)
        q, k, _, call = arguments
        keep_share(mechanism, q, k, call, kept)

    if not all(isinstance(mechanism, Thresholded) for mechanism in mechanisms):
        raise ValueError(f"kept={kept:g}: {type(mechanisms[0]).__name__} has no thresholds that could be calibrated")
    handles = [mechanism.register_forward_pre_hook(see) for mechanism in mechanisms]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
