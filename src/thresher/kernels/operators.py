"""Helpers to define torch operators: flat schemas from named tuples, and inputs by name.

Schemas of torch are flat. An operator can take a `NamedTuple` as a parameter; `flatten` replaces it by its fields,
so only the tuple lists them. A caller passes `**fields._asdict()`; backward finds inputs and places gradients
by name.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar, get_type_hints

from torch import Tensor
from torch.library import CustomOpDef

Result = TypeVar("Result")


def flatten(function: Callable[..., Result]) -> Callable[..., Result]:
    """Replace each parameter that is a `NamedTuple` by the fields of this tuple."""
    signature = inspect.signature(function)
    groups = [p.annotation if hasattr(p.annotation, "_fields") else None for p in signature.parameters.values()]

    @functools.wraps(function)
    def flat(*inputs: Any) -> Result:
        rest = iter(inputs)
        given = [next(rest) if group is None else group(*islice(rest, len(group._fields))) for group in groups]
        return function(*given)

    parameters: list[inspect.Parameter] = []
    for parameter, group in zip(signature.parameters.values(), groups, strict=True):
        hints = {parameter.name: parameter.annotation} if group is None else get_type_hints(group)
        parameters += [inspect.Parameter(name, parameter.kind, annotation=hint) for name, hint in hints.items()]
    flat.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return flat


@functools.cache
def list_input_names(operator: CustomOpDef) -> tuple[str, ...]:
    """List the names of an operator's inputs, in the order of its schema."""
    return tuple(argument.name for argument in operator._opoverload._schema.arguments)


def name_inputs(operator: CustomOpDef, inputs: Sequence[Any]) -> dict[str, Any]:
    """Map the inputs that torch passes to `setup_context` to their names."""
    return dict(zip(list_input_names(operator), inputs, strict=True))


def call_by_name(operator: CustomOpDef, inputs: Mapping[str, Any]) -> Any:
    """Call an operator with inputs by name; this takes half the time of keyword arguments."""
    return operator(*(inputs[name] for name in list_input_names(operator)))


def save_for_backward(ctx: Any, values: Mapping[str, Any]) -> None:
    """Save values for backward by name; tensors and lists of tensors go through autograd."""
    tensors: list[Tensor] = []
    ctx.lengths, ctx.others = {}, {}
    for name, x in values.items():
        if isinstance(x, Tensor):
            ctx.lengths[name] = None
            tensors.append(x)
        elif _is_tensor_list(x):
            ctx.lengths[name] = len(x)
            tensors += x
        else:
            ctx.others[name] = x
    ctx.save_for_backward(*tensors)


def load_saved_values(ctx: Any) -> dict[str, Any]:
    """Load the values of `save_for_backward`; call it once, because checkpointing allows no second time."""
    tensors = iter(ctx.saved_tensors)
    found = {
        name: next(tensors) if length is None else [next(tensors) for _ in range(length)]
        for name, length in ctx.lengths.items()
    }
    return found | ctx.others


def place_gradients(operator: CustomOpDef, inputs: Mapping[str, Any], **gradients: Tensor) -> tuple[Any, ...]:
    """Place gradients in the order of inputs; a list of tensors gets one None for each tensor.

    Args:
        operator: The operator.
        inputs: Inputs by name; only lists are required.
        **gradients: The gradients, by the names of the inputs.

    Raises:
        ValueError: A gradient belongs to no input.
    """
    names = list_input_names(operator)
    if unknown := gradients.keys() - set(names):
        raise ValueError(f"{operator} has no input {', '.join(sorted(unknown))}; its inputs are {', '.join(names)}")
    lists = {name: [None] * len(x) for name, x in inputs.items() if _is_tensor_list(x)}
    return tuple(map((lists | gradients).get, names))


def _is_tensor_list(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(each, Tensor) for each in x[:1])  # torch treats an empty list as one
