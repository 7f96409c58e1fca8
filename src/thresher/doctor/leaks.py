"""The self-test: what a mask hides is changed, and what it hides it from must not move."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thresher.attention import Mechanism, Pattern
from thresher.compute import ComputeMeter
from thresher.hosts import densify, sparsify
from thresher.hosts.core import holder

AS_IT_IS = "as it is"
MOVED = 1e-5  # of the largest output: rounding stays below
NOISE = 3.0

Inputs = Any  # a tensor, a tuple of arguments or a dict of keyword arguments


@dataclass(frozen=True)
class Change:
    """Two inputs that differ in what some outputs must not see.

    Attributes:
        what: "padding", "future" or "neighbours".
        before: Inputs.
        after: The same but for what is changed.
        tokens: Outputs [b, n] that must not move.
        examples: The same where there is one output for an example; None if that may move.
        noise: Tokens [b, n] whose embeddings are replaced by noise besides; None for none.
    """

    what: str
    before: Inputs
    after: Inputs
    tokens: Tensor | None
    examples: Tensor | None
    noise: Tensor | None = None


@dataclass(frozen=True)
class Subject:
    """A model and what its masks promise.

    Attributes:
        model: In evaluation mode.
        run: Runs it on inputs; returns outputs [b, n, ...] or [b, ...].
        changes: What to try.
        example_inputs: For hosts that must see a call to know what attends.
        mounted: Whether it holds mechanisms already.
    """

    model: nn.Module
    run: Callable[[Inputs], Tensor]
    changes: Sequence[Change]
    example_inputs: Inputs = None
    mounted: bool = False


def examined(
    subject: Subject, names: Sequence[str], settings: Mapping[str, Any], where: str | None, asked: bool
) -> Iterator[dict[str, Any]]:
    """Yield a row for the model as it is, and one for each mechanism in it.

    Args:
        subject: The model.
        names: Of the mechanisms.
        settings: Hyper-parameters by mechanism.
        where: Regular expression for the modules to replace.
        asked: Whether the user named the mechanisms: one that the model cannot take is then a failure.
    """
    row, moved = _row(subject, AS_IT_IS, subject.changes)
    if not subject.mounted:
        # Whether a model is causal is seen in itself: only where it hides the future must a mechanism.
        row["moved"].pop("future", None)
        row["failed"] = _leaks(row["moved"])
    yield row
    held = {what for what, by in moved.items() if by is not None and by <= MOVED}
    changes = [change for change in subject.changes if change.what in held]
    for name in names:
        try:
            sparsify(
                subject.model,
                name,
                where=where,
                example_inputs=subject.example_inputs,
                **settings.get(name, {}),
            )
        except ValueError as error:
            yield {"mechanism": name, "hosts": [], "kept": None, "moved": {}, "seconds": 0.0, "refused": str(error)} | {
                "failed": ["refused"] if asked else []
            }
            continue
        try:
            yield _row(subject, name, changes)[0]
        finally:
            densify(subject.model)


def _row(subject: Subject, name: str, changes: Sequence[Change]) -> tuple[dict[str, Any], dict[str, float | None]]:
    start = time.monotonic()
    kept = None
    hosts = hosts_of(subject.model)
    if hosts and changes:
        meter = ComputeMeter(subject.model)
        with torch.no_grad(), meter:
            subject.run(changes[0].before)
        kept = float(meter.kept())
    moved = {change.what: moved_by(subject, change) for change in changes}
    shown = {what: value for what, value in moved.items() if value is not None}
    row = {"mechanism": name, "hosts": hosts, "kept": kept, "moved": shown, "seconds": time.monotonic() - start}
    return row | {"refused": "", "failed": _leaks(shown)}, moved


def _leaks(moved: Mapping[str, float]) -> list[str]:
    return [what for what, value in moved.items() if not value <= MOVED]


@torch.no_grad()
def moved_by(subject: Subject, change: Change) -> float | None:
    """Return how far outputs move that must not, relative to the largest; None where nothing can be said."""
    before = subject.run(change.before)
    with disturbed(subject.model, change.before, change.noise):
        after = subject.run(change.after)
    by_token = change.tokens is not None and before.ndim >= 3 and before.shape[:2] == change.tokens.shape
    still = change.tokens if by_token else change.examples
    if still is None or len(still) != len(before):
        return None
    largest = float(before[still].abs().max())
    return float((after[still] - before[still]).abs().max()) / max(largest, torch.finfo(before.dtype).tiny)


@contextmanager
def disturbed(model: nn.Module, inputs: Inputs, noise: Tensor | None) -> Iterator[None]:
    """Replace what embeddings make of some tokens of the inputs by noise."""
    if noise is None:
        yield
        return
    values = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    ids = [x for x in values if isinstance(x, Tensor) and not x.is_floating_point() and x.shape == noise.shape]
    generator = torch.Generator().manual_seed(1)

    def replace(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        if not any(args[0].shape == x.shape and torch.equal(args[0], x) for x in ids):
            return out
        draws = torch.randn(out.shape, generator=generator).to(out) * NOISE * out.std()
        return torch.where(noise[..., None], draws, out)

    handles = [m.register_forward_hook(replace) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hosts_of(model: nn.Module) -> list[str]:
    """Say where mechanisms are: "12 noncausal self in TimmAttention"."""
    counts: dict[str, int] = {}
    for name, mechanism in model.named_modules():
        if isinstance(mechanism, Mechanism):
            parent = model.get_submodule(name.rpartition(".")[0])
            host = type(holder(parent) or parent).__name__
            place = f"{mechanism.pattern.name.lower().replace('_', ' ')} in {host}"
            counts[place] = counts.get(place, 0) + 1
    return [f"{count} {place}" for place, count in counts.items()]


def hides_future(model: nn.Module) -> bool:
    """Say whether a model holds mechanisms that are causal among their own tokens."""
    return any(isinstance(m, Mechanism) and m.pattern is Pattern.CAUSAL_SELF for m in model.modules())
