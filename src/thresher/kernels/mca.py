"""MCA's operator on CPUs: values projected from the features that each token drew, and from no others."""

from typing import Any

import torch
from torch import Tensor

from thresher.kernels.calling import call


@torch.library.custom_op("thresher::mca_encode", mutates_args=())
def encode(x: Tensor, rows: Tensor, chances: Tensor, cumulated: Tensor, uniform: Tensor, counts: Tensor) -> Tensor:
    """Project tokens to values from as many drawn features as `counts` says.

    Args:
        x: Tokens [b, m, d].
        rows: What each feature adds to a value [g, d, dv].
        chances: Of each feature [g, d].
        cumulated: Their sums from the first on [g, d]; a number draws the first feature whose sum exceeds it.
        uniform: Numbers in [0, 1), [m, b, g, d] or, the same for each example, [m, 1, g, d].
        counts: How many of its numbers a token uses, 0 to d, [b, g, m].

    Returns:
        Values [b, g, m, dv].
    """
    given = [t.contiguous() for t in (x, rows, chances, cumulated, uniform, counts)]
    out = x.new_empty(x.shape[0], rows.shape[0], x.shape[1], rows.shape[2])
    call("mca", "encode", x.dtype, *given, out, *_sizes(x, rows, uniform))
    return out


@encode.register_fake
def _(x: Tensor, rows: Tensor, chances: Tensor, cumulated: Tensor, uniform: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], rows.shape[0], x.shape[1], rows.shape[2])


@torch.library.custom_op("thresher::mca_back", mutates_args=())
def back(
    grad: Tensor, x: Tensor, rows: Tensor, chances: Tensor, cumulated: Tensor, uniform: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients to tokens and rows, the draws held constant."""
    given = [t.contiguous() for t in (x, rows, chances, cumulated, uniform, counts, grad)]
    into = x.new_empty(x.shape), rows.new_empty(rows.shape)
    call("mca", "back", x.dtype, *given, *into, *_sizes(x, rows, uniform))
    return into


@back.register_fake
def _(
    grad: Tensor, x: Tensor, rows: Tensor, chances: Tensor, cumulated: Tensor, uniform: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), rows.new_empty(rows.shape)


def _sizes(x: Tensor, rows: Tensor, uniform: Tensor) -> tuple[int, ...]:
    (b, m, d), (g, _, dv) = x.shape, rows.shape
    return b, m, d, g, dv, uniform.shape[1]


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *back(grad, *ctx.saved_tensors), None, None, None, None


encode.register_autograd(_backward, setup_context=_setup)
