"""The model that a network of this project wraps, and an adapter in place of the mechanisms in it."""

from pathlib import Path

from torch import nn

from thresher.hosts.core import find_holders
from thresher.hosts.public import densify
from thresher.hosts.saving import load_adapter


def get_model(net: nn.Module) -> nn.Module:
    """Get the model that users build without this package: what a network of this project wraps, or itself."""
    model: nn.Module = getattr(net, "model", net)
    return model


def exchange_for_adapter(net: nn.Module, place: str | Path) -> list[str]:
    """Exchange the mechanisms of a trained network for those of an adapter, in place.

    Args:
        net: A network with the weights that the adapter belongs to.
        place: See `load_adapter`.

    Returns:
        The names of the modules of the wrapped model that hold mechanisms now.

    Raises:
        FileNotFoundError: There is no adapter at that place.
        ValueError: The network builds its mechanisms in, or see `load_adapter`.
    """
    model = get_model(net)
    if not find_holders(model):
        raise ValueError(
            f"an adapter goes into models of other libraries, such as timm and transformers, and {type(net).__name__} "
            "builds its mechanisms in"
        )
    densify(model)
    return load_adapter(model, place)
