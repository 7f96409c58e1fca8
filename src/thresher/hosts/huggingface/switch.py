"""Make a model of transformers call our attention function."""

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedConfig as Config
from transformers import PreTrainedModel

_log = logging.getLogger(__name__)
_asking = 0  # running models that were asked for attention weights
NAME = "thresher"  # of our functions in the registry, and of our entry in a configuration


class Switch:
    """Makes a model call our functions while any mechanism is in it.

    Args:
        root: The model.

    Attributes:
        deciding: The configurations that decide whether the model calls our functions.
    """

    def __init__(self, root: PreTrainedModel) -> None:
        self.models = [module for module in root.modules() if isinstance(module, PreTrainedModel)]
        configs = (getattr(module, "config", None) for module in root.modules())
        read = {id(config): config for config in configs if isinstance(config, Config)}
        self.before = [(config, config._attn_implementation_internal) for config in read.values()]
        self.deciding: list[Config] = []
        self.inside = 0
        self.warned = False
        self.hooks: list[Any] = []

    def turn_on(self) -> None:
        self.inside += 1
        if self.inside == 1:
            for model in self.models:
                self.hooks += [
                    model.register_forward_pre_hook(self._enter, with_kwargs=True),
                    model.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
                ]
        for config, _ in self.before:
            config._attn_implementation_internal = NAME

    def turn_off(self) -> None:
        self.inside -= 1
        if not self.inside:
            self.deciding = []
            for hook in self.hooks:
                hook.remove()
            self.hooks = []
            for config, before in self.before:
                if config._attn_implementation_internal == NAME:  # else the user chose another one since
                    config._attn_implementation_internal = before

    def serve(self, module: nn.Module) -> None:
        """Record the configurations that decide whether an attention module calls our functions."""
        around = [model for model in self.models if any(inner is module for inner in model.modules())]
        for config in (getattr(module, "config", None), around[-1].config):
            if isinstance(config, Config) and all(config is not other for other in self.deciding):
                self.deciding.append(config)

    @property
    def idle(self) -> str:
        """The reason why mechanisms are not called: another attention was chosen; else empty."""
        others = [config._attn_implementation_internal for config in self.deciding]
        others = [other for other in others if other != NAME]
        return f"not asked: attn_implementation is {others[0]!r}" if others else ""

    def _enter(self, model: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> None:
        global _asking
        if _asks_for_weights(model, kwargs):
            _asking += 1
            if not self.warned:
                self.warned = True
                _log.warning(
                    "output_attentions=True: each attention is computed twice, the second time on as many columns of "
                    "values as it has keys; the weights have no gradient"
                )
        if self.idle:
            raise ValueError(
                f"mechanisms are mounted in this {type(model).__name__} and {self.idle}; call densify() first, or "
                f"return to them by set_attn_implementation({NAME!r})"
            )

    def _leave(self, model: PreTrainedModel, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        global _asking
        if _asks_for_weights(model, kwargs):
            _asking = max(_asking - 1, 0)


def is_asked_for_weights() -> bool:
    """Tell whether a running sparsified model was asked for attention weights."""
    return _asking > 0


def _asks_for_weights(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("output_attentions")
    return bool(getattr(model.config, "output_attentions", False) if asked is None else asked)
