"""The dense network as the teacher of itself, and what it says of held-out batches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from thresher.attention.contract import Cost
from thresher.attention.mechanism import dense_attention
from thresher.budget.meter import ComputeMeter
from thresher.budget.objectives import Objective, measure_error
from thresher.budget.tuning_state import Measurement


class Teacher:
    """Runs a network dense, as its own teacher, and sparse beside it.

    Args:
        run: Runs the network on a batch.
        objective: How outputs are compared.
        meter: Of the network.
    """

    def __init__(self, run: Callable[[Any], Any], objective: Objective, meter: ComputeMeter) -> None:
        self.run, self.objective, self.meter = run, objective, meter

    @torch.no_grad()
    def run_dense(self, batch: Any) -> Any:
        with dense_attention():
            return self.run(batch)

    def compare(self, batch: Any, wanted: Any = None) -> tuple[Tensor, Tensor]:
        """Return the error of the sparse network against the dense one, and what it keeps, differentiably.

        The meter then has the costs and the auxiliary losses of the sparse run.
        """
        wanted = self.run_dense(batch) if wanted is None else wanted
        with self.meter:
            found = self.run(batch)
        return measure_error(found, wanted, batch, self.objective), self.meter.kept()


class HeldOut:
    """Held-out batches, with the outputs of the dense network.

    Args:
        teacher: Runs the network.
        batches: Model inputs.

    Raises:
        ValueError: Nothing can be compared with a dense output.
    """

    def __init__(self, teacher: Teacher, batches: Sequence[Any]) -> None:
        self.teacher = teacher
        self.batches = [(batch, teacher.run_dense(batch)) for batch in batches]
        for batch, wanted in self.batches:
            measure_error(wanted, wanted, batch, teacher.objective)  # refuses outputs that nothing can be compared with

    @torch.no_grad()
    def measure(self) -> Measurement:
        """Measure error and share kept, each batch and each pair alike."""
        costs: list[Cost] = []
        errors = []
        for batch, wanted in self.batches:
            errors.append(float(self.teacher.compare(batch, wanted)[0]))
            costs += self.teacher.meter.costs()
        return Measurement(sum(errors) / len(errors), _share_kept(costs))

    @torch.no_grad()
    def measure_kept(self) -> float:
        """Measure the share kept of all visible pairs.

        Raises:
            ValueError: There are none.
        """
        costs: list[Cost] = []
        for batch, _ in self.batches:
            with self.teacher.meter:
                self.teacher.run(batch)
            costs += self.teacher.meter.costs()
        return _share_kept(costs)


def _share_kept(costs: Sequence[Cost]) -> float:
    spent, visible = (sum(float(getattr(cost, part).sum()) for cost in costs) for part in ("kept", "visible"))
    if not visible:
        raise ValueError("no held-out batch has a visible token: give inputs whose mask shows some")
    return spent / visible
