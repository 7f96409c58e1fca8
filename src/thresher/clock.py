"""How long something takes, for a person to read."""

import math


def clock(seconds: float | None) -> str:
    """Write a time as hours, minutes and seconds."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"
