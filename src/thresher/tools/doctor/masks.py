"""The mask test of a model: as it is, and with each mechanism mounted into it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from thresher.attention import Mechanism, Pattern
from thresher.budget.meter import ComputeMeter
from thresher.hosts import densify, sparsify
from thresher.hosts.core import find_host
from thresher.testing.models import Change, Subject, find_leaks, measure_leaks

AS_IT_IS = "as it is"


def check_masks(
    subject: Subject, names: Sequence[str], settings: Mapping[str, Any], where: str | None, required: bool
) -> Iterator[dict[str, Any]]:
    """Yield a row for the model as it is, and one for each mechanism in it.

    A mechanism must hide what the model itself hides.

    Args:
        subject: The model.
        names: Of the mechanisms.
        settings: Hyper-parameters by mechanism.
        where: Regular expression for the modules to replace.
        required: Whether a mechanism that the model cannot take is a failure, because the user named it.
    """
    row = _measure_row(subject, AS_IT_IS, subject.changes)
    hidden = [change for change in subject.changes if change.kind in row["moved"].keys() - set(row["failed"])]
    if not subject.mounted:
        # A model without mechanisms shows by itself whether it is causal: to see the future is no failure then.
        row["moved"].pop("future", None)
        row["failed"] = find_leaks(row["moved"])
    yield row
    for name in names:
        try:
            inputs = subject.example_inputs
            sparsify(subject.model, name, where=where, example_inputs=inputs, **settings.get(name, {}))
        except ValueError as error:
            refusal = {"refused": str(error), "failed": ["refused"] if required else []}
            yield {"mechanism": name, "hosts": [], "kept": None, "moved": {}, "seconds": 0.0} | refusal
            continue
        try:
            yield _measure_row(subject, name, hidden)
        finally:
            densify(subject.model)


def _measure_row(subject: Subject, name: str, changes: Sequence[Change]) -> dict[str, Any]:
    start = time.monotonic()
    hosts = describe_hosts(subject.model)
    kept = _measure_kept(subject, changes[0]) if hosts and changes else None
    moved = measure_leaks(subject, changes)
    row = {"mechanism": name, "hosts": hosts, "kept": kept, "moved": moved, "seconds": time.monotonic() - start}
    return row | {"refused": "", "failed": find_leaks(moved)}


def _measure_kept(subject: Subject, change: Change) -> float:
    meter = ComputeMeter(subject.model)
    with torch.no_grad(), meter:
        subject.run(change.before)
    return float(meter.kept())


def describe_hosts(model: nn.Module) -> list[str]:
    """Describe where mechanisms are: "12 noncausal self in TimmAttention"."""
    counts: dict[str, int] = {}
    for name, mechanism in model.named_modules():
        if isinstance(mechanism, Mechanism):
            parent = model.get_submodule(name.rpartition(".")[0])
            host = type(find_host(parent) or parent).__name__
            place = f"{mechanism.pattern.name.lower().replace('_', ' ')} in {host}"
            counts[place] = counts.get(place, 0) + 1
    return [f"{count} {place}" for place, count in counts.items()]


def hides_future(model: nn.Module) -> bool:
    """Tell whether a model holds mechanisms with causal self attention."""
    return any(isinstance(m, Mechanism) and m.pattern is Pattern.CAUSAL_SELF for m in model.modules())
