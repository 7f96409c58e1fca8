"""Jobs: what one row measures, as plain values that can be sent to another process."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from thresher.attention import hyperparameters
from thresher.attention.contract import Pattern
from thresher.attention.mechanism import Mechanism

DTYPES = ("float32", "bfloat16", "float16", "float64")
AUTO, REFERENCE = "auto", "reference"
BACKENDS = (REFERENCE, "cpu", "triton")


@dataclass(frozen=True)
class Scene:
    """The conditions that all rows of a run share.

    Attributes:
        batch: Examples of a call.
        heads: Heads of a call.
        head_dim: Features of a head.
        dtype: Type of queries, keys and values.
        device: Where they are.
        threads: Of PyTorch on the CPU; None keeps its own number.
        repetitions: Of each timing.
        seconds: Time after which a row starts no further repetition.
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
    """One contender at one setting, pattern and length.

    Attributes:
        name: Of the mechanism, or of another package.
        target: Dotted name of the mechanism's class; None for another package.
        hyperparameters: Arguments of its constructor.
        kept: Share of the visible pairs that thresholds are calibrated to keep; None leaves them.
        knobs: Name of the setting.
        backend: Argument `backend` of the mechanism; None if it has none.
        pattern: Name of a pattern, in lower case.
        n: Number of queries and of keys.
        model: "attention", "decode", or the network of a training step.
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
    def check_key(self) -> tuple[Any, ...]:
        """Jobs with the same key need one check: the same contender at any length."""
        return self.name, self.knobs, self.pattern, self.backend

    @property
    def backend_label(self) -> str:
        return self.backend or (REFERENCE if self.target else "peer")

    def __str__(self) -> str:
        parts = (self.name, self.knobs, self.pattern, f"N {self.n}", self.backend_label)
        return "  ".join(part for part in parts if part)


def load_mechanism_class(target: str) -> type[Mechanism]:
    """Load the class that a config names.

    Raises:
        ValueError: There is none, or it is not a mechanism.
    """
    try:
        found = resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no {target}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Mechanism)):
        raise ValueError(f"{target} is no attention mechanism")
    return found


def find_backends(cls: type[Mechanism]) -> list[str]:
    """Find the values of a mechanism's argument `backend`, except "auto"; none if it has no such argument.

    A `Literal` annotation lists candidates; for a plain string, each known backend is one. Those that build are found.
    """
    if "backend" not in hyperparameters(cls):
        return []
    hint = get_type_hints(cls.__init__)["backend"]
    candidates = [name for name in get_args(hint) if name != AUTO] if get_origin(hint) is Literal else BACKENDS
    pattern = next(pattern for pattern in Pattern if pattern in cls.supports)
    return [name for name in candidates if _can_build(cls, pattern, name)]


def select_backends(cls: type[Mechanism], device: str) -> list[str]:
    """Select the backends that run on a type of device; the interpreter of triton on CPUs is for tests."""
    elsewhere = {each.backend for each in cls.implementations if each.device not in (None, device)}
    here = {each.backend for each in cls.implementations if each.device in (None, device)}
    if device == "cpu":
        elsewhere, here = elsewhere | {"triton"}, here - {"triton"}
    return [name for name in find_backends(cls) if name not in elsewhere - here]


def _can_build(cls: type[Mechanism], pattern: Pattern, backend: str) -> bool:
    try:
        cls(1, 32, pattern, backend=backend)  # type: ignore[arg-type]
    except ValueError:
        return False
    return True


def find_pattern(job: Job) -> Pattern:
    return Pattern[job.pattern.upper()]


def build_mechanism(job: Job, heads: int, head_dim: int, **changes: Any) -> Mechanism:
    """Build the mechanism of a job.

    Raises:
        ValueError: A hyper-parameter is out of its range, or unknown.
    """
    assert job.target is not None
    given = dict(job.hyperparameters) | changes | ({} if job.backend is None else {"backend": job.backend})
    try:
        return load_mechanism_class(job.target)(heads, head_dim, find_pattern(job), **given)
    except TypeError as error:
        raise ValueError(f"{job.name}: {error}") from error
