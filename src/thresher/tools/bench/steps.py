"""Whole training steps of a small GPT and a ViT: forward, loss, backward, optimiser; sparse and dense in turns.

The dense network is what a user has without this toolkit: attention with `is_causal` rather than a mask, without meter
and budget. The sparse network has both. In bfloat16 both networks train under autocast. Tokens and images are random:
the time of a step does not depend on them, and thresholds are calibrated on them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.attention.contract import Attended, Call, Cost, Pattern
from thresher.attention.mechanism import Mechanism, Metered
from thresher.attention.shared.thresholds import Thresholded
from thresher.budget.meter import ComputeMeter
from thresher.hosts import densify
from thresher.models.build import timm_classifier
from thresher.models.transformer import LanguageModel
from thresher.tools.bench import memory
from thresher.tools.bench.inputs import calibrate_to_share
from thresher.tools.bench.jobs import Job, Scene, load_mechanism_class
from thresher.tools.bench.measure import describe_machine, prepare_process, summarise_times
from thresher.tools.bench.timing import Clock, compute_spread, time_interleaved

VOCABULARY, CLASSES, PATCH = 257, 10, 16
WEIGHT = 10.0  # of the squared distance to the target

Batch = tuple[Tensor, Tensor]


class Fused(Metered):
    """Dense attention of sequences without padding, by PyTorch's own kernel; its cost is not counted."""

    needs_source = False

    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__()
        self.num_heads, self.pattern, self.dropout = num_heads, pattern, 0.0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.pattern.causal)
        uncounted = out.new_zeros(out.shape[:2])
        return Attended(out, Cost(*[uncounted] * len(Cost._fields)))


def measure_step(job: Job, scene: Scene) -> dict[str, Any]:
    """Measure one row of training steps."""
    prepare_process(scene)
    plain, sparse = build_networks(job, scene)
    batch = draw_batch(job, scene)
    mechanisms = [m for m in sparse.modules() if isinstance(m, Mechanism)]
    row: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": describe_machine(scene),
    }
    row |= {"heads": mechanisms[0].num_heads, "head_dim": mechanisms[0].head_dim, "batch": job.sizes["batch"]}
    meter = ComputeMeter(sparse)
    with torch.no_grad(), meter:
        if job.kept is not None:
            calibrate_in_order(mechanisms, partial(sparse, batch[0]), job.kept)
        wanted, got = plain(batch[0]).float(), sparse.eval()(batch[0]).float()
    row["rel_error"] = float((got - wanted).norm() / wanted.norm())
    sparse.train()
    dense_step, sparse_step = Step(plain, None, None, scene), Step(sparse, meter, job.kept, scene)
    if scene.memory and memory.can_reset(scene.device):
        for name, step in (("peak_mb", sparse_step), ("dense_peak_mb", dense_step)):
            step(batch)
            row[name] = memory.measure_growth(partial(step, batch), scene.device)
    recorded = time_interleaved(
        {"sparse": partial(sparse_step, batch), "dense": partial(dense_step, batch)}, scene.repetitions, scene.seconds
    )
    row |= {"kept": float(meter.kept().detach()), "mac_ratio": float(meter.ratio().detach())}
    for name, who in (("", "sparse"), ("dense_", "dense")):
        row[f"{name}step_ms"] = compute_spread([sum(parts) for parts in recorded[who]]).median
    row["speedup_step"] = row["dense_step_ms"] / row["step_ms"]
    return row | summarise_times(
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


def build_networks(job: Job, scene: Scene) -> tuple[nn.Module, nn.Module]:
    """Build the network without this toolkit, and the same network with a mechanism."""
    backend = {} if job.backend is None else {"backend": job.backend}
    cls = load_mechanism_class(job.target or "")

    def make(num_heads: int, head_dim: int, pattern: Any) -> Mechanism:
        return cls(num_heads, head_dim, pattern, **{**job.hyperparameters, **backend})

    build: Callable[..., nn.Module] = _build_gpt if job.model == "gpt" else _build_vit
    plain, sparse = build(job, scene, Fused), build(job, scene, make)
    if job.model == "vit":
        densify(plain)
    sparse.load_state_dict(plain.state_dict(), strict=True)
    return tuple(net.to(scene.device) for net in (plain, sparse))  # type: ignore[return-value]


def _build_gpt(job: Job, scene: Scene, make: Any) -> nn.Module:
    width = scene.heads * scene.head_dim
    sizes = {"dim": width, "ffn_dim": 4 * width, "num_heads": scene.heads, "depth": job.sizes["depth"]}
    return LanguageModel(make, causal=True, vocabulary=VOCABULARY, length=job.n, **sizes)


def _build_vit(job: Job, scene: Scene, make: Any) -> nn.Module:
    side = isqrt(job.n - 1)
    if side * side != job.n - 1:
        raise ValueError(f"a ViT has a square of patches and a class token: N = 197, 785, ..., not {job.n}")
    return timm_classifier(
        attention=make, num_classes=CLASSES, channels=3, image_size=side * PATCH, name=job.sizes["name"]
    )


def draw_batch(job: Job, scene: Scene) -> Batch:
    """Draw inputs and targets."""
    rng = torch.Generator().manual_seed(scene.seed)
    examples = job.sizes["batch"]
    if job.model == "gpt":
        tokens = torch.randint(1, VOCABULARY, (examples, job.n + 1), generator=rng).to(scene.device)
        return tokens[:, :-1], tokens[:, 1:]
    side = isqrt(job.n - 1) * PATCH
    images = torch.randn(examples, 3, side, side, generator=rng).to(scene.device)
    return images, torch.randint(CLASSES, (examples,), generator=rng).to(scene.device)


def calibrate_in_order(mechanisms: Sequence[Mechanism], run: Callable[[], object], kept: float) -> None:
    """Calibrate each mechanism on the queries and keys that reach it, first to last, in one pass."""

    def see(mechanism: nn.Module, arguments: tuple[Tensor, Tensor, Tensor, Call]) -> None:
        assert isinstance(mechanism, Mechanism)
        q, k, _, call = arguments
        calibrate_to_share(mechanism, q, k, call, kept)

    if not all(isinstance(mechanism, Thresholded) for mechanism in mechanisms):
        raise ValueError(f"kept={kept:g}: {type(mechanisms[0]).__name__} has no thresholds that could be calibrated")
    handles = [mechanism.register_forward_pre_hook(see) for mechanism in mechanisms]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
