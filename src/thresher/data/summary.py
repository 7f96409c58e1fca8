"""Summarise the data that were read: examples, classes, origin and omissions of each part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class PartSummary:
    """The contents of one part of the data.

    Attributes:
        name: train, val or test.
        kind: The noun for examples, in the plural.
        examples: Their number; None if the part is not read.
        source: Their origin, in words.
        classes: Number of examples of each class; None without classes.
        left_out: Numbers of unused items, by a reason that names the items.
        cut: Number of truncated examples; None if nothing is truncated.
        tokens_read: Tokens of all texts; None if they are not counted.
        tokens_used: Tokens that are in examples.
    """

    name: str
    kind: str
    examples: int | None
    source: str
    classes: Mapping[str, int] | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    cut: int | None = None
    tokens_read: int | None = None
    tokens_used: int | None = None

    def line(self) -> str:
        """Format the summary as one line."""
        if self.examples is None:
            return f"{self.name}: not read"
        said = [f"{self.examples:,} {self.kind}"]
        if self.classes:
            said[0] += f", {describe_classes(self.classes)}"
        if self.cut:
            said.append(f"{self.cut:,} of them cut off at their end")
        if self.tokens_read:
            said.append(f"{format_share(self.tokens_used or 0, self.tokens_read)} of {self.tokens_read:,} tokens used")
        said.append(self.source)
        if left_out := [f"{count:,} {reason}" for reason, count in self.left_out.items() if count]:
            said.append(f"left out: {', '.join(left_out)}")
        return f"{self.name}: {'; '.join(said)}"


def describe_classes(classes: Mapping[str, int]) -> str:
    """Describe the number of classes, and the smallest and the largest by name."""
    least, most = min(classes, key=lambda name: classes[name]), max(classes, key=lambda name: classes[name])
    if classes[least] == classes[most]:
        return f"{len(classes):,} classes of {classes[least]:,} each"
    return f"{len(classes):,} classes of {classes[least]:,} ({least}) to {classes[most]:,} ({most})"


def format_share(part: int, whole: int) -> str:
    """Format a share in percent; 100 % only for the whole."""
    share = 100 * part / whole
    return f"{min(share, 99.9) if part < whole else share:.1f} %".replace(".0 %", " %")


def count_classes(names: Sequence[str], labels: Sequence[int]) -> dict[str, int]:
    """Count the examples of each class, in the order of the classes."""
    counts = [0] * len(names)
    for label in labels:
        counts[label] += 1
    return dict(zip(names, counts, strict=True))


def describe_held_out(share: float, seed: int, of: str = "train", option: str = "val_fraction") -> str:
    """Describe a part that was drawn from another one."""
    return f"held out from {of}: data.{option}={share:g}, drawn by data.seed={seed}"


def build_json(parts: Sequence[PartSummary]) -> dict[str, Any]:
    """Build the content of data.json."""
    return {
        "parts": [{n: _to_plain(value) for n, value in vars(part).items()} | {"line": part.line()} for part in parts]
    }


def _to_plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
