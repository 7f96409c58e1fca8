"""One row, measured in a process of its own: times, peak memory, cost and error, and those of dense attention."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thresher.bench import memory
from thresher.bench.checks import check
from thresher.bench.contenders import Contender, mechanism_contender
from thresher.bench.inputs import Inputs, exact
from thresher.bench.jobs import Job, Scene
from thresher.bench.peers import peer_contender
from thresher.bench.timing import Clock, interleaved, spread

WARM_UP = 64  # tokens of the call that loads libraries and starts threads before memory is measured


def checked(job: Job, scene: Scene) -> str | None:
    """Return what is wrong with a mechanism, or None."""
    set_up(scene)
    try:
        check(job, scene)
    except AssertionError as error:
        return str(error)
    return None


def measured(job: Job, scene: Scene) -> dict[str, Any]:
    """Return the numbers of a row."""
    set_up(scene)
    contender, dense, inputs = _contenders(job, scene)
    row: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": machine(scene)}
    row |= _outcome(job, contender, dense, inputs)
    gradient, note = None, None
    if scene.backward:
        gradient = torch.randn_like(contender.forward(inputs))
        note = _obstacle(contender, inputs, gradient) if job.target is None else None
        gradient = None if note else gradient
    if scene.memory and memory.resettable(scene.device):
        row["peak_mb"] = _peak(contender, inputs, gradient, scene)
        row["dense_peak_mb"] = _peak(dense, inputs, gradient, scene)
    clock = Clock(scene.device)
    passes = {
        (who, what): one_pass
        for who, each in (("", contender), ("dense_", dense))
        for what, one_pass in each.passes(inputs, gradient, clock).items()
    }
    return row | times(interleaved(passes, scene.repetitions, scene.seconds)) | ({"note": note} if note else {})


def peak(job: Job, scene: Scene, of_dense: bool) -> float:
    """Return the peak memory of a contender or its baseline: the first and only large call of this process."""
    set_up(scene)
    contender, dense, inputs = _contenders(job, scene)
    gradient = torch.randn_like(dense.forward(inputs.first(1))).expand_as(inputs.v) if scene.backward else None
    return _peak(dense if of_dense else contender, inputs, gradient, scene)


def times(recorded: Mapping[tuple[str, str], Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Turn recorded passes, named by ("" or "dense_", "forward" or "training"), into the columns of a row."""
    row: dict[str, Any] = {"repetitions": len(recorded["", "forward"])}
    both: dict[str, float] = {}
    for who in ("", "dense_"):
        forward = spread([seconds for (seconds,) in recorded[who, "forward"]])
        row |= {f"{who}fwd_ms": forward.median, f"{who}fwd_ms_low": forward.low, f"{who}fwd_ms_high": forward.high}
        if (who, "training") in recorded:
            parts = recorded[who, "training"]
            backward = spread([back for _, back in parts])
            row |= {f"{who}bwd_ms": backward.median, f"{who}bwd_ms_low": backward.low}
            row |= {f"{who}bwd_ms_high": backward.high, f"{who}train_fwd_ms": spread([f for f, _ in parts]).median}
            both[who] = spread([sum(part) for part in parts]).median
    row["speedup_fwd"] = row["dense_fwd_ms"] / row["fwd_ms"]
    if both:
        row["speedup_fwd_bwd"] = both["dense_"] / both[""]
    return row


def machine(scene: Scene) -> str:
    """Say what is measured on."""
    if scene.device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def set_up(scene: Scene) -> None:
    """Prepare this process for a scene."""
    if scene.threads is not None:
        torch.set_num_threads(scene.threads)
    torch.manual_seed(scene.seed)


def _contenders(job: Job, scene: Scene) -> tuple[Contender, Contender, Inputs]:
    return mechanism_contender(job, scene) if job.target else peer_contender(job, scene)


def _outcome(job: Job, contender: Contender, dense: Contender, inputs: Inputs) -> dict[str, Any]:
    """Return what was kept and counted, and how far the output is from softmax attention."""
    contender.module.eval()
    with torch.no_grad():
        out, cost = contender.attend(inputs)
    if not out.isfinite().all():
        raise ValueError("its output is not finite")
    wanted = exact(job, inputs) if job.target else dense.forward(inputs)
    row: dict[str, Any] = {"rel_error": float((out.float() - wanted.float()).norm() / wanted.float().norm())}
    if cost is not None:
        row |= {"kept": share(cost.kept, cost.visible), "mac_ratio": share(cost.total, cost.dense)}
    return row


def share(part: Tensor, whole: Tensor) -> float:
    return float(part.double().sum() / whole.double().sum())


def _obstacle(contender: Contender, inputs: Inputs, gradient: Tensor) -> str | None:
    """Return why another package's attention cannot go back, or None."""
    try:
        contender.training(inputs, gradient, Clock("cpu"))
    except Exception as error:
        return f"no backward: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def _peak(contender: Contender, inputs: Inputs, gradient: Tensor | None, scene: Scene) -> float:
    clock = Clock(scene.device)

    def call(some: Inputs, back: Tensor | None) -> None:
        if back is None:
            contender.forward(some)
        else:
            contender.training(some, back, clock)

    small = min(inputs.q.shape[2], max(WARM_UP, contender.fewest))
    call(inputs.first(small), None if gradient is None else gradient[:, :, :small])
    return memory.peak_extra(lambda: call(inputs, gradient), scene.device)
