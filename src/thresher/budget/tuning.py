"""Tune the thresholds and tail factors of a frozen network against its own dense output.

Weights that train along absorb whatever is dropped, and leave the thresholds without a signal. On a pretrained network
whose weights are frozen heads really differ, and the dense network says exactly what each dropped pair costs:

1. Calibrate from three starts, in each unit that thresholds may have (`starts.py`). The start that errs less on
   held-out batches is taken.
2. Tune, by Adam, on  E / sg(E) + multiplier g + 10 g^2  with g = kept / target - 1. E is the error against the same
   network with dense attention; divided by its own value, one learning rate serves every network. The multiplier rises
   while too much is kept. Mechanisms that have auxiliary losses add them, weighted, and their selectors train, too.
3. Settle: shift all thresholds by one value, so that the target holds exactly on the held-out batches.

The dense teacher is the network itself inside `dense_attention`: two forwards and one backward a step, and no second
copy of the weights.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from thresher.attention.options import check_choice, check_integer
from thresher.attention.shared.offsets import HeadOffsets, named_offsets
from thresher.attention.shared.selectors import Selector, named_selectors
from thresher.attention.shared.tail import Tail
from thresher.attention.shared.thresholds import Thresholds, Unit
from thresher.budget.auxiliary import choose_weights, sum_losses
from thresher.budget.calibration import evaluation_mode, run_model
from thresher.budget.meter import ComputeMeter
from thresher.budget.objectives import Objective
from thresher.budget.settling import settle
from thresher.budget.starts import check_owners, check_units, copy_state, load_state, measure_starts
from thresher.budget.teacher import HeldOut, Teacher
from thresher.budget.tuning_state import STARTS, Measurement, Start, StateFile, TuningState, begin

LEARNING_RATES = {"nats": 0.12, "spread": 0.03, "log": 0.1}  # of offsets, by their unit
FACTOR_RATE = 0.03
SELECTOR_RATE = 1e-3
MULTIPLIER_RATE = 0.05
QUADRATIC = 10.0
LEAST_ERROR = 1e-9  # what rounding alone makes of equal outputs


@dataclass
class Tuning:
    """What a tuning found.

    Attributes:
        starts: Of each start, at the target: "share", each head its share; "value", one threshold for all heads, where
            there are thresholds; "greedy", shares by sensitivity, where batches are enough. If several units were
            tried, each with its unit before it: "nats_share".
        tuned: After it, at the target.
        headroom: What allocation by sensitivity was predicted to gain before anything was tuned, as a share of the
            error, and how uncertain that is; None if there were too few batches to tell.
        history: `error` and `kept` of each step's batch.
        thresholds: By the dotted name of their mechanism; of top-k the factors of its numbers of keys.
        factors: Tail factors, by the dotted name of their mechanism; empty without tails.
        unit: Of the thresholds, where `units` let the tuning choose it.
    """

    starts: dict[str, Measurement]
    tuned: Measurement
    headroom: tuple[float, float] | None = None
    history: list[Measurement] = field(default_factory=list)
    thresholds: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)
    unit: str | None = None

    @property
    def calibrated(self) -> Measurement:
        """The better start."""
        return min(self.starts.values(), key=lambda measured: measured.error)


def tune(
    model: nn.Module,
    batches: Iterable[Any],
    kept: float,
    *,
    held_out: Iterable[Any] | None = None,
    forward: Callable[[Any], Any] | None = None,
    objective: Objective = "auto",
    steps: int = 90,
    lr: float | None = None,
    evaluate_every: int = 30,
    starts: Sequence[Start] = STARTS,
    units: Sequence[Unit] | None = None,
    auxiliary: Mapping[str, float] | None = None,
    state_file: str | Path | None = None,
    progress: bool = True,
    on_step: Callable[[int, Measurement], None] | None = None,
) -> Tuning:
    """Tune each head's threshold, and its tail factor, so that `kept` of the pairs serve the network best.

    Weights stay as they are, the network runs in evaluation mode, and the thresholds of the best evaluation win. The
    same batches give the same result. If an error or an interrupt ends it, thresholds are what they were.

    Args:
        model: A model with thresholds inside, as `sparsify(model, "latte", tail="mean")` leaves it, or with factors of
            numbers of keys: `sparsify(model, "topk", tail="mean", per_head=True)`.
        batches: Model inputs on the model's device; they are kept in memory and used in turn.
        kept: Share of the visible pairs to keep, in (0, 1).
        held_out: Other inputs, to choose the best step by and to settle on; by default the last fifth of `batches`, at
            least one.
        forward: How to run the model on a batch; by default `model(**batch)` for mappings, else `model(batch)`.
        objective: "error" is the relative squared error of the output (its `last_hidden_state`, or itself), "kl" the
            divergence of the softmax of the dense logits from that of the sparse ones; "auto" is "kl" where the output
            has `logits`.
        steps: Steps, of one batch each; 0 only calibrates, from the better start.
        lr: Learning rate of thresholds; by default 0.12 in nats and 0.03 in spreads, and 0.1 of logarithms of factors.
        evaluate_every: Steps between two evaluations on the held-out batches.
        starts: The starts to calibrate from: "share", "value", "greedy". "value" needs thresholds, and "greedy" two
            batches and a target of at least 0.01; what is not possible is left out.
        units: The units of thresholds to calibrate in, "spread" and "nats"; the tuning goes on in that of the best
            start. A mechanism that takes another unit than it had gets its surrogate of a usual width there, 0.1
            spreads or 0.35 nats. By default all keep the unit that they have.
        auxiliary: Weights of auxiliary losses by name; those left out have the weight that their mechanism states.
        state_file: Written at each evaluation. If it exists, tuning continues from it and ends, bit for bit, where it
            would have ended; the file of a finished tuning gives its result again.
        progress: Show a progress bar with the time left.
        on_step: Called with the number of each finished step, and with `error` and `kept` of its batch; a tuning that
            continues reports the steps before once more.

    Raises:
        ValueError: The model has no trainable thresholds, none that count in one of `units`, or no auxiliary loss of a
            name in `auxiliary`; there are too few batches, `kept` is out of range or out of reach, the dense network's
            output is not finite, or `state_file` is damaged or of another tuning.
    """
    for start in starts:
        check_choice("starts", start, STARTS)
    check_units("units", units)
    check_integer("steps", steps, 0)
    check_integer("evaluate_every", evaluate_every, 1)
    if not 0 < kept < 1:
        raise ValueError(f"kept is a share of the visible pairs and must lie between 0 and 1, got {kept}")
    heads = {name: each for name, each in named_offsets(model) if each.offset.requires_grad}
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no trainable thresholds to tune: sparsify(model, 'latte') gives it some "
            "(gate.mode=hard and trainable=False freeze them), and sparsify(model, 'topk', per_head=True) factors of "
            "its numbers of keys"
        )
    if units is not None:
        check_owners(model, heads)
    train, held = _split(batches, held_out)
    run = forward or partial(run_model, model)
    tails = {name.rpartition(".")[0]: each for name, each in model.named_modules() if isinstance(each, Tail)}
    selectors = dict(named_selectors(model))
    trained = [*heads.values(), *tails.values(), *selectors.values()]
    fixed = [each for _, each in named_offsets(model) if not each.offset.requires_grad]
    with evaluation_mode(model), _frozen(model), _restored_on_error([*trained, *fixed]):
        teacher = Teacher(run, objective, ComputeMeter(model))
        weights = choose_weights(teacher.meter.weights, auxiliary)
        exam = HeldOut(teacher, held)
        settings: dict[str, Any] = {
            "kept": kept,
            "steps": steps,
            "lr": lr,
            "objective": objective,
            "every": evaluate_every,
            "starts": list(starts),
            "units": None if units is None else list(units),
            "weights": _sum_weights(model),
        }
        settings |= {"batches": len(train), "held_out": len(held), "thresholds": list(heads), "tails": list(tails)}
        if weights:
            settings |= {"auxiliary": weights, "selectors": list(selectors)}
        memory = StateFile(state_file, settings)
        found = memory.read()
        now = found or begin(
            measure_starts(starts, units, model, train, kept, teacher, exam, heads.values(), trained, fixed)
        )
        load_state(trained, now.values)  # the unit, too, on which learning rates depend
        optimizer, schedule = _build_optimizer(heads.values(), tails.values(), selectors.values(), lr, steps)
        if found is None:
            now.optimizer, now.schedule = optimizer.state_dict(), schedule.state_dict()
            memory.write(now)
        else:
            optimizer.load_state_dict(now.optimizer)
            schedule.load_state_dict(now.schedule)
            if on_step is not None:
                for step, measured in enumerate(now.history, start=1):
                    on_step(step, measured)
        batches = itertools.islice(itertools.cycle(train), now.step, steps)
        for batch in _show(batches, now.step, steps, progress):
            _take_step(now, teacher, batch, kept, weights, optimizer, schedule)
            if on_step is not None:
                on_step(now.step, now.history[-1])
            if now.step % evaluate_every == 0 or now.step == steps:
                _evaluate(now, exam, kept, heads.values(), trained)
                now.optimizer, now.schedule = optimizer.state_dict(), schedule.state_dict()
                memory.write(now)
        load_state(trained, now.best_values)
        return Tuning(
            starts=now.starts,
            tuned=now.best,
            headroom=now.headroom,
            history=now.history,
            thresholds={name: each.values().detach().clone() for name, each in heads.items()},
            factors={name: each.values().detach().clone() for name, each in tails.items()},
            unit=None if units is None else next(t.unit for t in heads.values() if isinstance(t, Thresholds)),
        )


def _take_step(
    now: TuningState,
    teacher: Teacher,
    batch: Any,
    kept: float,
    weights: Mapping[str, float],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Lower the error on a batch, and bring what it keeps to the target."""
    error, found = teacher.compare(batch)
    gap = found / kept - 1
    scale = error.detach().clamp_min(LEAST_ERROR)
    loss = error / scale + now.multiplier * gap + QUADRATIC * gap**2 + sum_losses(teacher.meter.losses(), weights)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    now.step += 1
    now.multiplier += MULTIPLIER_RATE * float(gap.detach())
    now.history.append(Measurement(float(error.detach()), float(found.detach())))


def _evaluate(
    now: TuningState, exam: HeldOut, kept: float, heads: Iterable[HeadOffsets], trained: Sequence[nn.Module]
) -> None:
    """Measure the current values where they meet the target, and keep them if they are the best."""
    now.values = copy_state(trained)
    settle(heads, exam.measure_kept, kept)
    measured = exam.measure()
    if measured.error < now.best.error:
        now.best, now.best_values = measured, copy_state(trained)
    load_state(trained, now.values)


def _split(batches: Iterable[Any], held_out: Iterable[Any] | None) -> tuple[list[Any], list[Any]]:
    train = list(batches)
    held = None if held_out is None else list(held_out)
    if held is None:
        number = max(len(train) // 5, 1)
        train, held = train[:-number], train[-number:]
    if not train or not held:
        raise ValueError("tuning needs at least one batch to tune on and another to measure on")
    return train, held


def _sum_weights(model: nn.Module) -> str:
    """Sum the sizes of all weights, so that a state does not continue on another network."""
    return f"{sum(float(p.detach().double().abs().sum()) for p in _list_weights(model)):.6e}"


def _list_weights(model: nn.Module) -> list[nn.Parameter]:
    """List every parameter that is no threshold, no factor of keys, no tail factor and no selector's."""
    own = {id(p) for m in model.modules() if isinstance(m, HeadOffsets | Tail | Selector) for p in m.parameters()}
    return [p for p in model.parameters() if id(p) not in own]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Take the gradient from every weight."""
    frozen = [p for p in _list_weights(model) if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


@contextmanager
def _restored_on_error(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Give modules their state back if an error or an interrupt ends the block."""
    before = copy_state(modules)
    try:
        yield
    except BaseException:
        load_state(modules, before)
        raise


def _build_optimizer(
    heads: Iterable[HeadOffsets],
    tails: Iterable[Tail],
    selectors: Iterable[Selector],
    lr: float | None,
    steps: int,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Build Adam whose learning rates fall to zero."""
    groups: list[dict[str, Any]] = [
        {"params": [each.offset], "lr": LEARNING_RATES[each.unit] if lr is None else lr} for each in heads
    ]
    groups += [{"params": [each.factor], "lr": FACTOR_RATE} for each in tails]
    groups += [{"params": list(each.parameters()), "lr": SELECTOR_RATE} for each in selectors]
    optimizer = torch.optim.Adam(groups, betas=(0.8, 0.99))
    falling = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / max(steps, 1))) / 2
    )
    return optimizer, falling


def _show(items: Iterable[Any], done: int, number: int, progress: bool) -> Iterator[Any]:
    columns = (TextColumn("tune"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        yield from bar.track(items, total=number, completed=done)
