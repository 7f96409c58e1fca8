"""Settle on a budget: shift the thresholds of all heads by one value until the target holds."""

from collections.abc import Callable, Iterable

import torch

from thresher.attention.shared.offsets import HeadOffsets

TOLERANCE = 5e-4  # of the share kept, relative
MEASUREMENTS = 30  # at most, within a bracket


@torch.no_grad()
def settle(heads: Iterable[HeadOffsets], measure: Callable[[], float], kept: float) -> None:
    """Shift all offsets by one value, so that `measure` gives the target within `TOLERANCE` of it.

    The share kept rises with the shift. A bracket of the target is widened from the current offsets, then narrowed
    by the Illinois variant of false position: a handful of measurements where bisection takes a dozen.

    Raises:
        ValueError: No shift reaches it.
    """
    every = list(heads)
    start = [each.offset.clone() for each in every]
    values = torch.cat([each.values().flatten() for each in every])
    size, lowest, highest = float(values.mean()) + 1e-3, -float(values.max()) - 1, 1e4
    if any(each.unit == "log" for each in every):
        size, lowest, highest = 1.0, -20.0, 20.0

    measured: dict[float, float] = {}

    def move(shift: float) -> None:
        for each, offset in zip(every, start, strict=True):
            each.offset.copy_(offset + shift)

    def excess(shift: float) -> float:
        if shift not in measured:
            move(shift)
            measured[shift] = measure() / kept - 1
        return measured[shift]

    near, of_near = 0.0, excess(0.0)
    step = -of_near * size
    far, of_far = near, of_near
    while abs(of_far) > TOLERANCE and of_far * of_near > 0:
        if far in (lowest, highest):
            shares = [kept * (excess(shift) + 1) for shift in (lowest, highest)]
            move(0.0)
            raise ValueError(
                f"kept={kept:g} is out of reach: thresholds keep between {shares[0]:.3g} and {shares[1]:.3g}"
            )
        near, of_near = far, of_far
        far = min(max(far + step, lowest), highest)
        of_far, step = excess(far), 2 * step
    for _ in range(MEASUREMENTS):
        if abs(of_far) <= TOLERANCE or abs(far - near) <= 1e-4 * size:
            break
        shift = (near * of_far - far * of_near) / (of_far - of_near)
        found = excess(shift)
        if found * of_far < 0:
            near, of_near = far, of_far
        else:
            of_near /= 2
        far, of_far = shift, found
    move(min(measured, key=lambda shift: abs(measured[shift])))  # a few pairs are a coarse unit
