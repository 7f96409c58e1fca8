"""Record every call of a mechanism in a network, and recover its attention map (see `attention/maps.py`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from thresher.attention.contract import Attended, Call
from thresher.attention.maps import Weights, recover_weights
from thresher.attention.mechanism import Mechanism


class RecordedCall(NamedTuple):
    """One call of a mechanism."""

    name: str
    mechanism: Mechanism
    q: Float[Tensor, "b h n d"]
    k: Float[Tensor, "b hk m d"]
    v: Float[Tensor, "b hk m dv"]
    call: Call
    attended: Attended


@contextmanager
def record_calls(net: nn.Module) -> Iterator[list[RecordedCall]]:
    """Record every call of a mechanism inside a network; a module that is called twice appears twice.

    Raises:
        ValueError: The network holds no mechanism.
    """
    calls: list[RecordedCall] = []
    mechanisms = {name: m for name, m in net.named_modules() if isinstance(m, Mechanism)}
    if not mechanisms:
        raise ValueError(f"{type(net).__name__} holds no mechanism whose attention could be shown; sparsify() it first")

    def record(name: str, mechanism: Mechanism, args: tuple[Any, ...], attended: Attended) -> None:
        q, k, v, call = args
        calls.append(RecordedCall(name, mechanism, q, k, v, call, attended))

    handles = [m.register_forward_hook(partial(record, name)) for name, m in mechanisms.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def recover_map(recorded: RecordedCall) -> Weights:
    """Recover the map of a recorded call; the mechanism must be in evaluation mode.

    Raises:
        ValueError: The output is no weighted sum of the values, not even up to a factor for each row.
    """
    name, mechanism, q, k, v, call, attended = recorded
    assert not mechanism.training
    try:
        return recover_weights(mechanism, q, k, v, call, attended.out)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
