"""The ledger of a sweep: what is planned, done and left, in a study that all drivers share.

A sweep is a set of planned slots. Each attempt at a slot is one trial of the study, with `slot` and `attempt` in its
user attributes from the moment it exists. Drivers hold no lock. Two of them may create the same attempt: the trial with
the lower number is the attempt, the other is surplus, and all drivers ignore it. A storage hands out a waiting trial
once, and lets a trial finish once. So a slot finishes once, whichever driver dies.
"""

import hashlib
import os
import random
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from thresher.tools.sweep import processes
from thresher.tools.sweep.samplers import build_sampler
from thresher.tools.sweep.space import Spaces

AHEAD = 4  # attempts that are created before a driver is free to run them


class State(Enum):
    """The state of a slot."""

    LEFT = "left"
    RUNNING = "running"
    DONE = "done"
    PRUNED = "pruned"
    FAILED = "failed"


@dataclass(frozen=True)
class Plan:
    """The points that a sweep tries, and its objectives.

    Args:
        spaces: Of overrides.
        objectives: `maximize` or `minimize` by the name of a metric.
        sampler: One of `samplers.SAMPLERS`.
        trials: How many; None for the grid, which tries all its points.
        seed: Of the sampler.
        requeue: How often a lost trial is retried.
    """

    spaces: Spaces
    objectives: Mapping[str, str]
    sampler: str
    trials: int | None = None
    seed: int = 0
    requeue: int = 1

    def slots(self) -> dict[str, tuple[str, ...] | None]:
        """Return the overrides of each slot; None where the sampler proposes them."""
        if self.sampler == "grid":
            return {" ".join(point): point for point in self.spaces.grid()}
        assert self.trials is not None
        return {str(i): None for i in range(self.trials)}

    def identity(self) -> dict[str, Any]:
        """Return the part of the plan that may not change when a sweep resumes."""
        sampled = None if self.sampler == "grid" else self.spaces.text()
        return {"objectives": dict(self.objectives), "sampled": sampled}


@dataclass
class View:
    """The study at one moment.

    Args:
        latest: The last attempt at each slot that has one, by slot.
        states: Of every planned slot.
        lost: How often attempts at a slot were lost, by slot.
        surplus: Waiting trials that are no attempt.
        outside: How many slots of the study are not in this plan.
        drivers: The last sign of life of each driver.
    """

    latest: dict[str, FrozenTrial] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    surplus: list[int] = field(default_factory=list)
    outside: int = 0
    drivers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def in_states(self, *states: State) -> list[str]:
        """Return the slots in any of the states, in the order of the plan."""
        return [slot for slot, state in self.states.items() if state in states]

    def running(self) -> list[FrozenTrial]:
        """Return the trials that run, as far as is known."""
        return [self.latest[slot] for slot in self.in_states(State.RUNNING)]


def derive_view(trials: Sequence[FrozenTrial], slots: Mapping[str, Any], requeue: int) -> View:
    """Derive the state of every slot from the trials of a study."""
    attempts: dict[str, dict[int, FrozenTrial]] = defaultdict(dict)
    view = View()
    for trial in sorted(trials, key=lambda trial: trial.number):
        slot, attempt = trial.user_attrs.get("slot"), trial.user_attrs.get("attempt", 0)
        if slot is None or attempt in attempts[slot]:
            if trial.state == TrialState.WAITING:
                view.surplus.append(trial.number)
        else:
            attempts[slot][attempt] = trial
    for slot, tried in attempts.items():
        if slot not in slots:
            view.outside += 1
        view.latest[slot] = tried[max(tried)]
        view.lost[slot] = sum(
            t.user_attrs.get("lost", {}).get("counts", False) for t in tried.values() if _has_failed(t)
        )
    for slot in slots:
        view.states[slot] = _find_state(view.latest.get(slot), view.lost.get(slot, 0), requeue)
    return view


def _has_failed(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL


def _find_state(trial: FrozenTrial | None, lost: int, requeue: int) -> State:
    if trial is None or trial.state == TrialState.WAITING:
        return State.LEFT
    if trial.state == TrialState.FAIL:
        return State.LEFT if "lost" in trial.user_attrs and lost <= requeue else State.FAILED
    return {
        TrialState.RUNNING: State.RUNNING,
        TrialState.COMPLETE: State.DONE,
        TrialState.PRUNED: State.PRUNED,
    }[trial.state]


@dataclass(frozen=True)
class Claim:
    """An attempt that this driver must run."""

    slot: str
    number: int
    overrides: tuple[str, ...]


class Ledger:
    """The shared study, as one driver sees it.

    Args:
        storage: Of the study.
        name: Of the study.
        plan: Of the sweep; all drivers must have the same.
        workers: Trials that this driver runs at a time.

    Raises:
        ValueError: The study was begun with other objectives or, where a sampler proposes, another space.
    """

    def __init__(self, storage: BaseStorage, name: str, plan: Plan, workers: int = 1) -> None:
        self.plan = plan
        self.slots = plan.slots()
        self.driver = uuid.uuid4().hex[:12]
        self._workers = workers
        self._storage = storage
        directions = [StudyDirection[direction.upper()] for direction in plan.objectives.values()]
        self.study = optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
        self._study_id = storage.get_study_id_from_name(name)
        self._check_plan()

    def _check_plan(self) -> None:
        was, now = self.study.user_attrs.get("plan"), self.plan.identity()
        if was is None:
            self.study.set_user_attr("plan", now)
        elif was != now:
            raise ValueError(
                f"the sweep began with {was}, and now asks for {now}: that is another sweep. Give it another name, or "
                "undo the change"
            )

    # Reading

    def view(self) -> View:
        """Read the study."""
        view = derive_view(self.study.get_trials(deepcopy=False), self.slots, self.plan.requeue)
        prefix = "driver:"
        attributes = self.study.user_attrs.items()
        view.drivers = {k.removeprefix(prefix): v for k, v in attributes if k.startswith(prefix)}
        return view

    # Signs of life

    def beat(self, ended: bool = False) -> None:
        """Write a sign of life of this driver, or its end."""
        me = processes.identify(os.getpid())
        self.study.set_user_attr(f"driver:{self.driver}", me | {"beat": time.time(), "ended": ended})

    # Starting

    def claim(self) -> Claim | None:
        """Claim the next attempt, with its overrides; return None if nothing waits."""
        while True:
            view = self.refill()
            if not any(self.is_waiting(view, slot) for slot in view.states):
                return None
            self.study.sampler = build_sampler(self.plan.sampler, self._seed(view), self._workers)
            trial = self.study.ask()
            slot = trial.user_attrs.get("slot")
            latest = self.view().latest.get(slot) if slot in self.slots else None
            if slot is None or latest is None or latest.number != trial.number:
                self.lose(trial.number, "not needed", counts=False)  # a surplus, or of another plan
                continue
            overrides = self.slots[slot]
            return Claim(slot, trial.number, self.plan.spaces.suggest(trial) if overrides is None else overrides)

    def _seed(self, view: View) -> int:
        """Return a seed that differs after each restart and between drivers."""
        begun = sum(slot in view.latest for slot in view.in_states(*State)) - sum(
            self.is_waiting(view, s) for s in view.states
        )
        key = f"{self.plan.seed}/{begun}/{self.driver if self._others(view) else ''}"
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big")

    def _others(self, view: View) -> bool:
        return any(key != self.driver and not driver["ended"] for key, driver in view.drivers.items())

    @staticmethod
    def is_waiting(view: View, slot: str) -> bool:
        """Tell whether an attempt at a slot waits for a driver."""
        return slot in view.latest and view.latest[slot].state == TrialState.WAITING

    def refill(self) -> View:
        """Read the study; create attempts where few are waiting and more are left."""
        while True:
            view = self.view()
            for number in view.surplus:
                self.lose(number, "not needed", counts=False)
            missing = [slot for slot in view.in_states(State.LEFT) if not self.is_waiting(view, slot)]
            if not missing or len(view.in_states(State.LEFT)) - len(missing) >= AHEAD:
                return view
            # Drivers that start together would all create the same one.
            slot = random.choice(missing[:AHEAD]) if self._others(view) else missing[0]
            self._create(slot, view.latest.get(slot))

    def _create(self, slot: str, before: FrozenTrial | None) -> None:
        """Create the next attempt at a slot, with the parameters of the one before."""
        params, attempt = ({}, 0) if before is None else (before.params, before.user_attrs["attempt"] + 1)
        self.study.enqueue_trial(params, user_attrs={"slot": slot, "attempt": attempt})

    def retry_failed(self) -> int:
        """Create a new attempt at every failed slot; return how many."""
        view = self.view()
        failed = view.in_states(State.FAILED)
        for slot in failed:
            self._create(slot, view.latest[slot])
        return len(failed)

    # Writing

    def note(self, number: int, **attributes: Any) -> bool:
        """Write attributes of a running trial; return whether it was still running."""
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        try:
            for key, value in attributes.items():
                self._storage.set_trial_user_attr(trial_id, key, value)
        except UpdateFinishedTrialError:
            return False
        return True

    def finish(self, number: int, state: TrialState, values: Sequence[float] | None = None, **attributes: Any) -> None:
        """Finish a trial, unless it is finished already."""
        if not self.note(number, **attributes):
            return
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        with suppress(UpdateFinishedTrialError):
            self._storage.set_trial_state_values(trial_id, state, values)

    def lose(self, number: int, reason: str, counts: bool) -> None:
        """Give up an attempt without a result; the slot is retried unless it was lost too often.

        Args:
            number: Of the trial.
            reason: What happened.
            counts: Whether it counts towards `requeue`; not where the trial cannot be the cause.
        """
        self.finish(number, TrialState.FAIL, lost={"reason": reason, "counts": counts})
