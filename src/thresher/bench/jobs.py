"""What one row of the benchmark measures, as plain values that a process of its own can be handed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from thresher.attention import hyperparameters
from thresher.attention.base import Mechanism, Pattern

DTYPES = ("float32", "bfloat16", "float16", "float64")
AUTO, REFERENCE = "auto", "reference"
BACKENDS = (REFERENCE, "cpu", "triton")


@dataclass(frozen=True)
class Scene:
    """What all rows of a run share.

    Attributes:
        batch: Examples of a call.
        heads: Heads of a call.
        head_dim: Features of a head.
        dtype: Type of queries, keys and values.
        device: Where they are.
        threads: Of PyTorch on the CPU; None leaves its own number.
        repetitions: Of each timing.
        seconds: Time after which a row begins no further repetition.
        backward: Whether training is timed, too.
        memory: Whether peak memory is measured.
        inputs: "random", or a file of recorded queries, keys and values.
        seed: Of random inputs and draws.
    """

    batch: int
    heads: int
    head_dim: int
    dtype: str
    device: str
    threads: int | None
    repetitions: int
    seconds: float
    backward: bool
    memory: bool
    inputs: str
    seed: int

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True)
class Job:
    """One contender at one setting, in one pattern, at one length.

    Attributes:
        name: Of the mechanism, or of the package that offers another attention.
        target: Dotted name of the mechanism's class; None for another package.
        hyperparameters: What it is built with.
        kept: Share of the visible pairs that thresholds are calibrated to keep, if they are.
        knobs: What to call the setting.
        backend: What the mechanism is told as its `backend`; None if it takes none, and is its own reference.
        pattern: Name of a pattern, in lower case.
        n: Number of queries and of keys.
        model: What is timed: "attention", "decode", or the network of a training step.
    """

    name: str
    target: str | None
    hyperparameters: Mapping[str, Any]
    kept: float | None
    knobs: str
    backend: str | None
    pattern: str
    n: int
    model: str = "attention"
    sizes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def checked_as(self) -> tuple[Any, ...]:
        """What a check holds for: the same contender at any length."""
        return self.name, self.knobs, self.pattern, self.backend

    @property
    def shown_backend(self) -> str:
        return self.backend or (REFERENCE if self.target else "peer")

    def __str__(self) -> str:
        parts = (self.name, self.knobs, self.pattern, f"N {self.n}", self.shown_backend)
        return "  ".join(part for part in parts if part)


def mechanism_class(target: str) -> type[Mechanism]:
    """Return the class that a config names.

    Raises:
        ValueError: There is none, or it is no mechanism.
    """
    try:
        found = resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no {target}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Mechanism)):
        raise ValueError(f"{target} is no attention mechanism")
    return found


def backends_of(cls: type[Mechanism]) -> list[str]:
    """Return what a mechanism may be told as its `backend`, but "auto"; nothing where it takes none.

    Its annotation lists them as a `Literal`; of a plain string, those that it can be built with are found by trying.
    """
    if "backend" not in hyperparameters(cls):
        return []
    hint = get_type_hints(cls.__init__)["backend"]
    if get_origin(hint) is Literal:
        return [name for name in get_args(hint) if name != AUTO]
    pattern = next(pattern for pattern in Pattern if pattern in cls.supports)
    return [name for name in BACKENDS if _builds(cls, pattern, name)]


def _builds(cls: type[Mechanism], pattern: Pattern, backend: str) -> bool:
    try:
        cls(1, 32, pattern, backend=backend)  # type: ignore[call-arg]
    except ValueError:
        return False
    return True


def pattern_of(job: Job) -> Pattern:
    return Pattern[job.pattern.upper()]


def build(job: Job, heads: int, head_dim: int, **changes: Any) -> Mechanism:
    """Build the mechanism of a job.

    Raises:
        ValueError: A hyper-parameter is out of its range, or unknown.
    """
    assert job.target is not None
    given = dict(job.hyperparameters) | changes | ({} if job.backend is None else {"backend": job.backend})
    try:
        return mechanism_class(job.target)(heads, head_dim, pattern_of(job), **given)
    except TypeError as error:
        raise ValueError(f"{job.name}: {error}") from error
