"""One row of attention: times, peak memory, cost and error, beside dense attention."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thresher.testing.inputs import Inputs
from thresher.tools.bench import memory
from thresher.tools.bench.checks import check
from thresher.tools.bench.contenders import Contender, build_mechanism_contender
from thresher.tools.bench.inputs import attend_exactly
from thresher.tools.bench.jobs import Job, Scene
from thresher.tools.bench.peers import build_peer_contender
from thresher.tools.bench.timing import Clock, compute_spread, time_interleaved

WARM_UP = 64  # tokens of a first call that loads libraries and starts threads


def find_fault(job: Job, scene: Scene) -> str | None:
    """Check the mechanism of a job; return its fault, or None."""
    prepare_process(scene)
    try:
        check(job, scene)
    except AssertionError as error:
        return str(error)
    return None


def measure_attention(job: Job, scene: Scene) -> dict[str, Any]:
    """Measure one row of attention."""
    prepare_process(scene)
    contender, dense, inputs = _build_contenders(job, scene)
    row: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": describe_machine(scene),
    }
    row |= _measure_outcome(job, contender, dense, inputs)
    gradient, note = None, None
    if scene.backward:
        gradient = torch.randn_like(contender.forward(inputs))
        note = _find_obstacle(contender, inputs, gradient) if job.target is None else None
        gradient = None if note else gradient
    if scene.memory and memory.can_reset(scene.device):
        row["peak_mb"] = _measure_peak(contender, inputs, gradient, scene)
        row["dense_peak_mb"] = _measure_peak(dense, inputs, gradient, scene)
    clock = Clock(scene.device)
    passes = {
        (who, what): one_pass
        for who, each in (("", contender), ("dense_", dense))
        for what, one_pass in each.passes(inputs, gradient, clock).items()
    }
    return (
        row
        | summarise_times(time_interleaved(passes, scene.repetitions, scene.seconds))
        | ({"note": note} if note else {})
    )


def measure_peak(job: Job, scene: Scene, of_dense: bool) -> float:
    """Measure the peak memory of a contender or its baseline, by the only large call of this process."""
    prepare_process(scene)
    contender, dense, inputs = _build_contenders(job, scene)
    gradient = torch.randn_like(dense.forward(inputs.first(1))).expand_as(inputs.v) if scene.backward else None
    return _measure_peak(dense if of_dense else contender, inputs, gradient, scene)


def summarise_times(recorded: Mapping[tuple[str, str], Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Turn the times of passes, named ("" or "dense_", "forward" or "training"), into columns of a row."""
    row: dict[str, Any] = {"repetitions": len(recorded["", "forward"])}
    both: dict[str, float] = {}
    for who in ("", "dense_"):
        forward = compute_spread([seconds for (seconds,) in recorded[who, "forward"]])
        row |= {f"{who}fwd_ms": forward.median, f"{who}fwd_ms_low": forward.low, f"{who}fwd_ms_high": forward.high}
        if (who, "training") in recorded:
            parts = recorded[who, "training"]
            backward = compute_spread([back for _, back in parts])
            row |= {f"{who}bwd_ms": backward.median, f"{who}bwd_ms_low": backward.low}
            row |= {
                f"{who}bwd_ms_high": backward.high,
                f"{who}train_fwd_ms": compute_spread([f for f, _ in parts]).median,
            }
            both[who] = compute_spread([sum(part) for part in parts]).median
    row["speedup_fwd"] = row["dense_fwd_ms"] / row["fwd_ms"]
    if both:
        row["speedup_fwd_bwd"] = both["dense_"] / both[""]
    return row


def describe_machine(scene: Scene) -> str:
    """Name the device."""
    if scene.device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def prepare_process(scene: Scene) -> None:
    """Set the threads and the seed of this process."""
    if scene.threads is not None:
        torch.set_num_threads(scene.threads)
    torch.manual_seed(scene.seed)


def _build_contenders(job: Job, scene: Scene) -> tuple[Contender, Contender, Inputs]:
    return build_mechanism_contender(job, scene) if job.target else build_peer_contender(job, scene)


def _measure_outcome(job: Job, contender: Contender, dense: Contender, inputs: Inputs) -> dict[str, Any]:
    """Measure kept, MACs, and the distance of the output from softmax attention."""
    contender.module.eval()
    with torch.no_grad():
        out, cost = contender.attend(inputs)
    if not out.isfinite().all():
        raise ValueError("its output is not finite")
    wanted = attend_exactly(job, inputs) if job.target else dense.forward(inputs)
    row: dict[str, Any] = {"rel_error": float((out.float() - wanted.float()).norm() / wanted.float().norm())}
    if cost is not None:
        row |= {"kept": compute_share(cost.kept, cost.visible), "mac_ratio": compute_share(cost.total, cost.dense)}
    return row


def compute_share(part: Tensor, whole: Tensor) -> float:
    return float(part.double().sum() / whole.double().sum())


def _find_obstacle(contender: Contender, inputs: Inputs, gradient: Tensor) -> str | None:
    """Find out why the attention of another package has no backward pass; None if it has."""
    try:
        contender.training(inputs, gradient, Clock("cpu"))
    except Exception as error:
        return f"no backward: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def _measure_peak(contender: Contender, inputs: Inputs, gradient: Tensor | None, scene: Scene) -> float:
    clock = Clock(scene.device)

    def call(some: Inputs, back: Tensor | None) -> None:
        if back is None:
            contender.forward(some)
        else:
            contender.training(some, back, clock)

    small = min(inputs.q.shape[2], max(WARM_UP, contender.fewest))
    call(inputs.first(small), None if gradient is None else gradient[:, :, :small])
    return memory.measure_growth(lambda: call(inputs, gradient), scene.device)
