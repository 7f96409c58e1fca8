"""Trace mechanisms by torch.fx: a mechanism depends on values, so it becomes one node of the graph.

A tracer learns its leaves beforehand or never, so hosts create the node themselves, for any tracer.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.fx import Proxy


def find_proxy(values: Iterable[Any]) -> Proxy | None:
    """Find the first argument that is a proxy for a value of the graph."""
    for value in values:
        if isinstance(value, Proxy):
            return value
    return None


def create_node(function: Callable[..., Any], module: nn.Module, proxy: Proxy, args: tuple[Any, ...]) -> Any:
    """Create a node that calls a function whose first argument is a module."""
    tracer: Any = proxy.tracer
    held = tracer.create_proxy("get_attr", tracer.path_of_module(module), (), {})
    return tracer.create_proxy("call_function", function, (held, *args), {})


def create_leaf(module: nn.Module, proxy: Proxy, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Create a node that calls a module as a leaf."""
    tracer: Any = proxy.tracer
    path = tracer.path_of_module(module)
    outside = getattr(tracer, "current_module_qualname", None)  # torchvision's tracer names nodes by it
    if outside is not None:
        tracer.current_module_qualname = path
    try:
        return tracer.create_proxy("call_module", path, args, dict(kwargs))
    finally:
        if outside is not None:
            tracer.current_module_qualname = outside
