"""Watches transformers: each model that a test builds or loads is sparsified, when its outermost constructor ends."""

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

Sparsify = Callable[[PreTrainedModel, list[Any]], None]


class Watch:
    """Knows how deep in constructors and loading a model is, so that only whole models are sparsified.

    Args:
        sparsify: Takes a model and example inputs that may fit it.
    """

    def __init__(self, sparsify: Sparsify) -> None:
        self.sparsify = sparsify
        self.active = True
        self._depth = 0
        self._replaced: list[tuple[type, str, Any]] = []

    def start(self) -> None:
        for cls in [PreTrainedModel, *_descendants(PreTrainedModel)]:
            if "__init__" in vars(cls):
                self._replace(cls, "__init__", self._watched(vars(cls)["__init__"], lambda model, _: model))
        load = vars(PreTrainedModel)["from_pretrained"].__func__
        self._replace(PreTrainedModel, "from_pretrained", classmethod(self._watched(load, lambda _, out: _first(out))))
        self._replace(
            PreTrainedModel, "set_attn_implementation", _densified_first(PreTrainedModel.set_attn_implementation)
        )
        born = vars(PreTrainedModel)["__init_subclass__"].__func__

        def watch_newborn(cls: type, **kwargs: Any) -> None:
            born(cls, **kwargs)
            if "__init__" in vars(cls) and self.active:
                self._replace(cls, "__init__", self._watched(vars(cls)["__init__"], lambda model, _: model))

        self._replace(PreTrainedModel, "__init_subclass__", classmethod(watch_newborn))

    def stop(self) -> None:
        self.active = False
        for owner, name, original in reversed(self._replaced):
            setattr(owner, name, original)

    def _replace(self, owner: type, name: str, new: Any) -> None:
        self._replaced.append((owner, name, vars(owner)[name]))
        setattr(owner, name, new)

    def _watched(self, call: Callable[..., Any], model_of: Callable[[Any, Any], PreTrainedModel]) -> Callable[..., Any]:
        @functools.wraps(call)
        def watched(this: Any, *args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                out = call(this, *args, **kwargs)
            finally:
                self._depth -= 1
            if self._depth == 0 and self.active:
                model = model_of(this, out)
                with _random_state_kept():
                    self.sparsify(model, examples(model.config, model.dtype))
            return out

        return watched


@contextmanager
def watch(sparsify: Sparsify) -> Iterator[None]:
    """Sparsify each model of transformers that is built or loaded, until the context ends."""
    watching = Watch(sparsify)
    watching.start()
    try:
        yield
    finally:
        watching.stop()


def examples(config: PreTrainedConfig, dtype: torch.dtype) -> list[Any]:
    """Return inputs that may fit a model: images in text, then what a host knows itself, then the uncommon kinds."""
    ids = torch.arange(3, 17).view(2, 7) % max(getattr(config.get_text_config(), "vocab_size", 99), 1)
    inputs: list[Any] = [None, {"input_ids": ids.unsqueeze(0)}]  # the second for multiple choice
    vision = getattr(config, "vision_config", config)
    if hasattr(vision, "image_size") and hasattr(vision, "num_channels"):
        side = vision.image_size
        pixels = torch.zeros(
            2, vision.num_channels, *(side if isinstance(side, list | tuple) else (side, side)), dtype=dtype
        )
        inputs += [{"input_ids": ids, "pixel_values": pixels}, {"pixel_values": pixels}]
        image = getattr(config, "image_token_id", None)
        if image is not None:
            patches = getattr(config, "mm_tokens_per_image", 1)
            mixed = torch.cat([torch.full((2, patches), image), ids.masked_fill(ids == image, 1)], dim=1)
            inputs.insert(0, {"input_ids": mixed, "pixel_values": pixels, "token_type_ids": (mixed == image).long()})
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        sound = torch.zeros(2, config.num_mel_bins, 2 * config.max_source_positions, dtype=dtype)
        heard = torch.zeros(2, 9, config.hidden_size, dtype=dtype)
        inputs += [
            {"input_features": sound, "decoder_input_ids": ids[:, :5], "use_cache": False},
            {"input_features": sound},
            {"input_ids": ids, "encoder_hidden_states": heard, "use_cache": False},
            {"input_ids": ids, "use_cache": False},
        ]
    return inputs


def _densified_first(switch: Callable[..., Any]) -> Callable[..., Any]:
    """Take mechanisms out before another implementation is chosen: a model that holds some refuses to run it."""

    @functools.wraps(switch)
    def switched(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        from thresher.hosts import densify, mounted

        if mounted(model):
            densify(model)
        return switch(model, *args, **kwargs)

    return switched


@contextmanager
def _random_state_kept() -> Iterator[None]:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _descendants(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from _descendants(child)


def _first(out: Any) -> PreTrainedModel:
    return out[0] if isinstance(out, tuple) else out
