"""What a mechanism is compared with, on inputs of the caller's: softmax attention, its expectation, its reference.

Contract checks draw small inputs; others give the very backend, device, type and length that they want to know about.
Each comparison raises AssertionError.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from thresher.attention import Attended, Call, Mechanism
from thresher.attention.shared.thresholds import Thresholded
from thresher.testing.inputs import Inputs, attend, gradients

COST_TOLERANCE = 1e-6  # of the cost of dense attention
SHARE_TOLERANCE = 2e-3  # of the visible pairs
TIES = 50  # times the tolerance, where queries choose keys together


def compare_with_softmax(
    mechanism: Mechanism,
    inputs: Inputs,
    call: Call,
    softmax: Mapping[str, Tensor],
    allow: Callable[[Tensor], Tensor],
) -> None:
    """Compare a mechanism at its dense limit with softmax attention: output, gradients and total cost.

    Args:
        mechanism: Built with its `dense_limit`.
        inputs: What it attends to.
        call: How.
        softmax: What `softmax_attention` returns for the same inputs, or for them in a wider type.
        allow: Takes values of `softmax` and returns the error that each may have.

    Raises:
        AssertionError: It is something else, in training or in evaluation.
    """
    for training in (True, False):
        attended, found = gradients(mechanism.train(training), inputs, call, cost=0)
        assert attended.out.dtype == inputs.v.dtype, f"{inputs.v.dtype} values come out as {attended.out.dtype}"
        for name, wanted in softmax.items():
            got = attended.out if name == "out" else found[name]
            assert got is not None, f"{name} gets no gradient at the dense limit"
            assert got.shape == wanted.shape, f"{name} has shape {tuple(got.shape)} at the dense limit"
            error = (got.detach().double() - wanted.detach()).abs()
            assert (error <= allow(wanted.detach())).all(), (
                f"{name} is off softmax attention's by {error.amax().item():.1e} in {inputs.v.dtype}"
            )
        cost = attended.cost
        assert torch.equal(cost.kept, cost.visible), "not every visible pair is kept at the dense limit"
        total, dense = cost.total.double(), cost.dense.double()
        assert ((total - dense).abs() <= COST_TOLERANCE * dense).all(), "the total cost is not that of dense attention"


def compare_with_expectation(default: Mechanism, precise: Mechanism, inputs: Inputs, draws: int, factor: float) -> None:
    """Compare how far outputs are off the expectation in training, with usual and with `precise` hyper-parameters.

    Args:
        default: A stochastic mechanism.
        precise: The same, built with its `precise` hyper-parameters.
        inputs: What both attend to.
        draws: Outputs that each error is measured over.
        factor: By which the precise one must err less.

    Raises:
        AssertionError: It does not.
    """
    usual, near = (measure_sampling_error(mechanism, inputs, draws) for mechanism in (default, precise))
    assert near <= usual / factor, (
        f"more samples do not help: with precise hyper-parameters it is off its expectation by {near:.3g}, with these "
        f"by {usual:.3g}"
    )


@torch.no_grad()
def measure_sampling_error(mechanism: Mechanism, inputs: Inputs, draws: int) -> float:
    """Measure the root mean squared distance of outputs from their expectation in training, over a number of draws."""
    mechanism.train()
    wanted = mechanism.expectation(inputs.q, inputs.k, inputs.v, Call(source=inputs.source)).double()
    outs = (attend(mechanism, inputs, seed=seed).out.double() for seed in range(draws))
    return float(torch.stack([(out - wanted).square().mean() for out in outs]).mean().sqrt())


def compare_with_reference(
    fast: Mechanism, reference: Mechanism, inputs: Inputs, tolerance: float, name: str
) -> dict[str, float]:
    """Compare a backend with the reference, best where pairs are dropped, which the dense limit never does.

    A stochastic mechanism draws otherwise on each backend: it is compared in evaluation only.

    Args:
        fast: Built with the backend.
        reference: Built with the reference; it gets the state of `fast`.
        inputs: What both attend to.
        tolerance: Of differences, relative in norm: a tie that rounding breaks the other way moves a row, not the
            whole. Where queries choose keys together it moves all of their rows: differences may be `TIES` times as
            large.
        name: Of the backend.

    Returns:
        How far output and gradients are off the reference's, by name, at worst.

    Raises:
        AssertionError: They differ by more, another share of the pairs is kept, or other parameters are trained.
    """
    reference.load_state_dict(fast.state_dict())
    tolerance *= TIES if isinstance(fast, Thresholded) and fast.rows_together > 1 else 1
    differences: dict[str, float] = {}
    for training in (False,) if fast.stochastic else (True, False):
        (own, found), (plain, wanted) = (
            gradients(mechanism.train(training), inputs, cost=0) for mechanism in (fast, reference)
        )
        share, plain_share = (_measure_share(attended) for attended in (own, plain))
        assert abs(share - plain_share) <= SHARE_TOLERANCE, (
            f"{name} keeps {share:.4f} of the pairs, its reference {plain_share:.4f}"
        )
        for what, other in {"output": plain.out, **wanted}.items():
            got = own.out if what == "output" else found[what]
            assert (got is None) == (other is None), f"{name} and its reference do not both train {what}"
            if got is None or other is None or (what not in inputs.leaves() and what != "output"):
                continue
            error = float((got - other).detach().double().norm() / other.detach().double().norm())
            of = what if what == "output" else f"gradient of {what}"
            assert error <= tolerance, f"{name}'s {of} is off the reference's by {error:.1e}, more than {tolerance:g}"
            differences[of] = max(error, differences.get(of, 0.0))
    return differences


def _measure_share(attended: Attended) -> float:
    return float(attended.cost.kept.detach().sum() / attended.cost.visible.sum())
