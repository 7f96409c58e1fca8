"""The operator of MCA on CPUs: project values from the features that each token draws."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from thresher.kernels.calling import call
from thresher.kernels.operators import (
    call_by_name,
    flatten,
    load_saved_values,
    name_inputs,
    place_gradients,
    save_for_backward,
)


class Samples(NamedTuple):
    """Tokens and the features that they draw.

    Attributes:
        x: Tokens [b, m, d].
        rows: Rows of the weight, one for each feature, [g, d, dv].
        chances: Probability of each feature, [g, d].
        cumulated: Cumulative sums of `chances`, [g, d]; a number draws the first feature whose sum exceeds it.
        uniform: Numbers in [0, 1), [m, b, g, d], or [m, 1, g, d] where examples share them.
        counts: Numbers that each token uses, 0 to d, [b, g, m].
    """

    x: Tensor
    rows: Tensor
    chances: Tensor
    cumulated: Tensor
    uniform: Tensor
    counts: Tensor


@torch.library.custom_op("thresher::mca_encode", mutates_args=())
@flatten
def encode(samples: Samples) -> Tensor:
    """Project tokens to values [b, g, m, dv], each from `counts` drawn features."""
    values = _new_values(samples)
    call("mca", "encode", values.dtype, values=values, **_sample_fields(samples))
    return values


@encode.register_fake
@flatten
def _(samples: Samples) -> Tensor:
    return _new_values(samples)


@torch.library.custom_op("thresher::mca_back", mutates_args=())
@flatten
def back(grad: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """Compute the gradients to tokens and rows, with the draws held constant."""
    grad_x, grad_rows = _new_gradients(samples)
    gradients = {"grad": grad.contiguous(), "grad_tokens": grad_x, "grad_rows": grad_rows}
    call("mca", "back", grad_x.dtype, **gradients, **_sample_fields(samples))
    return grad_x, grad_rows


@back.register_fake
@flatten
def _(grad: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    return _new_gradients(samples)


def _new_values(samples: Samples) -> Tensor:
    x, rows = samples.x, samples.rows
    return x.new_empty(x.shape[0], rows.shape[0], x.shape[1], rows.shape[2])


def _new_gradients(samples: Samples) -> tuple[Tensor, Tensor]:
    return samples.x.new_empty(samples.x.shape), samples.rows.new_empty(samples.rows.shape)


def _sample_fields(samples: Samples) -> dict[str, Tensor | int]:
    """List the fields of the C++ struct `Samples`."""
    (b, m, d), (g, _, dv) = samples.x.shape, samples.rows.shape
    return {
        "tokens": samples.x.contiguous(),
        "rows": samples.rows.contiguous(),
        "chances": samples.chances.contiguous(),
        "cumulated": samples.cumulated.contiguous(),
        "uniform": samples.uniform.contiguous(),
        "counts": samples.counts.contiguous(),
        "examples": b,
        "m": m,
        "d": d,
        "groups": g,
        "dv": dv,
        "draws": samples.uniform.shape[1],
    }


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    save_for_backward(ctx, name_inputs(encode, inputs))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = load_saved_values(ctx)
    grad_x, grad_rows = call_by_name(back, saved | {"grad": grad})
    return place_gradients(encode, saved, x=grad_x, rows=grad_rows)


encode.register_autograd(_backward, setup_context=_setup)
