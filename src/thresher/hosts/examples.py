"""Build example inputs for a model of transformers."""

from typing import Any

import torch


def build_example_inputs(root: Any) -> dict[str, Any]:
    """Build small inputs for a model: text of 7 tokens, and 5 for a decoder behind an encoder; or an image.

    The lengths differ to distinguish cross attention from self attention.

    Raises:
        ValueError: The model takes other inputs.
    """
    config, device = root.config, root.device
    text = config.get_text_config()
    name = root.main_input_name
    if name == "input_ids" and hasattr(text, "vocab_size"):
        inputs: dict[str, Any] = {"input_ids": _build_ids(7, text.vocab_size, device)}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = _build_ids(5, config.get_text_config(decoder=True).vocab_size, device)
        return inputs | ({"use_cache": False} if hasattr(text, "use_cache") else {})
    vision = getattr(config, "vision_config", config)
    if name == "pixel_values" and hasattr(vision, "image_size") and hasattr(vision, "num_channels"):
        size = vision.image_size if isinstance(vision.image_size, tuple | list) else (vision.image_size,) * 2
        return {name: torch.zeros(2, vision.num_channels, *size, device=device, dtype=root.dtype)}
    raise ValueError(f"{type(root).__name__} takes {name}; give example_inputs, say {{{name!r}: ...}}")


def _build_ids(length: int, vocabulary: int, device: torch.device) -> torch.Tensor:
    return torch.arange(3, 3 + 2 * length, device=device).view(2, length) % vocabulary
