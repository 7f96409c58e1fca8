"""What has a model of transformers ask for our attention, and tells its configuration what is in it."""

from typing import Any

from transformers import PreTrainedConfig as Config
from transformers import PreTrainedModel

NAME = "thresher"  # of our functions in the registry, and of our entry in a configuration


class Switch:
    """Has a model ask for our functions as long as any mechanism is in it, and tells its configuration what is.

    Args:
        root: The model.
    """

    def __init__(self, root: PreTrainedModel) -> None:
        self.models = [module for module in root.modules() if isinstance(module, PreTrainedModel)]
        configs = (getattr(module, "config", None) for module in root.modules())
        read = {id(config): config for config in configs if isinstance(config, Config)}
        self.before = [(config, config._attn_implementation_internal) for config in read.values()]
        self.inside = 0
        self.hooks: list[Any] = []

    def turn_on(self) -> None:
        self.inside += 1
        if self.inside == 1:
            self.hooks = [m.register_forward_pre_hook(_refuse_weights, with_kwargs=True) for m in self.models]
            self.describe({})  # it may have been loaded with what another model held
        for config, _ in self.before:
            config._attn_implementation_internal = NAME

    def turn_off(self) -> None:
        self.inside -= 1
        if not self.inside:
            for hook in self.hooks:
                hook.remove()
            for config, before in self.before:
                config._attn_implementation_internal = before

    def note(self, name: str, recipe: dict[str, Any] | None) -> None:
        """Write into the configuration, which is saved with the model, what stands in a module; None is nothing."""
        others = {other: kept for other, kept in getattr(self.models[0].config, NAME, {}).items() if other != name}
        self.describe(others if recipe is None else others | {name: recipe})

    def describe(self, recipes: dict[str, dict[str, Any]]) -> None:
        config = self.models[0].config
        if recipes:
            setattr(config, NAME, recipes)
        elif hasattr(config, NAME):
            delattr(config, NAME)


def _refuse_weights(model: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> None:
    asked = kwargs.get("output_attentions")
    if asked or (asked is None and getattr(model.config, "output_attentions", False)):
        raise ValueError("a mechanism has no matrix of attention weights to return; leave output_attentions out")
