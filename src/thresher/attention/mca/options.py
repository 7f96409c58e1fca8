"""Options of MCA that select how features are drawn."""

from dataclasses import dataclass
from typing import Literal, get_args

from thresher.attention.options import check_choice, check_integer

Distribution = Literal["multinomial", "poisson"]
Draws = Literal["token", "shared"]
Resample = Literal["forward", "never"]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How features are drawn.

    Attributes:
        distribution: "multinomial", as published, or "poisson" counts, independent for each feature.
        draws: Separate draws for each "token", or one sequence "shared" by the tokens of a head.
        resample: Draw anew at each "forward" in training, or "never". Evaluation always draws from `seed`.
        seed: Seed of fixed draws.
    """

    distribution: Distribution = "multinomial"
    draws: Draws = "token"
    resample: Resample = "forward"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("sampling.distribution", self.distribution, get_args(Distribution))
        check_choice("sampling.draws", self.draws, get_args(Draws))
        check_choice("sampling.resample", self.resample, get_args(Resample))
        check_integer("sampling.seed", self.seed, 0, 2**63 - 1)
