"""Options of LATTE: the estimate of scores and the training of the gate."""

from dataclasses import dataclass
from typing import Literal, get_args

from thresher.attention.latte.quantise import Split
from thresher.attention.options import check_choice, check_flags, check_number
from thresher.attention.shared.thresholds import Surrogate

Mode = Literal["ste", "soft", "hard"]
Scoring = Literal["exact", "int8"]


@dataclass(frozen=True, kw_only=True)
class EstimateOptions:
    """How to estimate scores from low-precision codes.

    Attributes:
        bits: Bits of the estimate: 2, 4, 8, or "exact" for unquantised scores.
        split: How codes are split into high and low bits, "round" or "truncate".
        scoring: Scores of kept pairs: "exact", or "int8" for the completed 8-bit product.
    """

    bits: int | str = 4
    split: Split = "round"
    scoring: Scoring = "exact"

    def __post_init__(self) -> None:
        check_choice("estimate.bits", self.bits, (2, 4, 8, "exact"))
        check_choice("estimate.split", self.split, get_args(Split))
        check_choice("estimate.scoring", self.scoring, get_args(Scoring))

    @property
    def is_exact(self) -> bool:
        """Whether scores are exact and need no codes."""
        return self.bits == "exact" and self.scoring == "exact"

    @property
    def share(self) -> float:
        """What an estimate costs, as a share of an 8-bit score."""
        return 1.0 if isinstance(self.bits, str) else (self.bits / 8) ** 2


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """How to train thresholds; evaluation uses a hard gate in all modes.

    Attributes:
        mode: "ste", a hard gate with the gradient of a smooth step; "soft", a sigmoid that weighs keys in training;
            "hard", thresholds without gradient.
        surrogate: Step that gives the gate its gradient: "inside" reaches kept pairs only (none if all are kept),
            "compact" pairs within 3 tau of the threshold, "sigmoid" all pairs, which no kernel computes.
        tau: Width of the step, in the unit of the threshold.
        into_scores: Pass the gate's gradient of the task loss to the scores too, so that a dropped key can come back.
    """

    mode: Mode = "ste"
    surrogate: Surrogate = "inside"
    tau: float = 0.5
    into_scores: bool = True

    def __post_init__(self) -> None:
        check_choice("gate.mode", self.mode, get_args(Mode))
        check_choice("gate.surrogate", self.surrogate, get_args(Surrogate))
        check_number("gate.tau", self.tau, above=0.0)
        check_flags(**{"gate.into_scores": self.into_scores})
        if self.mode == "soft" and self.surrogate != "sigmoid":
            raise ValueError(
                f"gate.mode=soft weighs keys by a sigmoid and needs gate.surrogate=sigmoid; "
                f"gate.surrogate={self.surrogate} is for gate.mode=ste"
            )
