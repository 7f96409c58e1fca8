"""A cache for generation that keeps what mechanisms make of keys, so that a step codes its own token and no other."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from thresher.attention.base import KeyCodes, Mechanism
from thresher.hosts.core import Guest


def coded_cache(model: PreTrainedModel) -> Cache:
    """Return an empty cache for a model of transformers, to be passed to its `generate` or `forward`.

    It is the growing cache that such models make themselves, and beside the keys it keeps their low-precision codes
    (about a quarter of the keys' memory in fp32). Tokens are the same with it, steps take less time: see docs/bench.md.

    Raises:
        ValueError: No mechanism in the model makes codes of its cached keys.
    """
    cache = DynamicCache(config=model.config)
    coded = 0
    for module in model.modules():
        guest, index = module.__dict__.get("_guest"), getattr(module, "layer_idx", None)
        if not isinstance(guest, Guest) or index is None or not _codes(guest.mechanism):
            continue
        if type(cache.layers[index]) is DynamicLayer:
            cache.layers[index] = CodedLayer(guest.mechanism)
            coded += 1
    if not coded:
        raise ValueError(
            f"no attention of this {type(model).__name__} makes codes of the keys that it caches: latte does in causal "
            "self attention over a whole sequence, with est_bits a number and scoring=exact. The model's own cache "
            "serves as well"
        )
    return EncoderDecoderCache(cache, DynamicCache(config=model.config)) if model.config.is_encoder_decoder else cache


class CodedLayer(DynamicLayer):
    """Keys and values of one layer, which grow, and what a mechanism makes of the keys.

    Codes go with the very tensor of keys that they were made of. Whatever puts another one in its place, and does not
    bring their codes along, has all of them made again.
    """

    def __init__(self, mechanism: Mechanism) -> None:
        super().__init__()
        self.mechanism = mechanism

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        old = kept_codes(self.keys, self.mechanism)
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        new = self.mechanism.codes_of(keys if old is None else key_states)
        if new is not None:
            codes = new if old is None else KeyCodes(*(torch.cat(both, 2) for both in zip(old, new, strict=True)))
            _keep_codes(keys, self.mechanism, codes)
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        codes = kept_codes(self.keys, self.mechanism)
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # LongTensor there, which no tensor is
        if codes is not None and self.keys is not None:
            kept = KeyCodes(*(x.index_select(0, beam_idx.to(x.device)) for x in codes))
            _keep_codes(self.keys, self.mechanism, kept)


def kept_codes(keys: Tensor | None, mechanism: Mechanism) -> KeyCodes | None:
    """Return the codes that a `CodedLayer` keeps of these keys, if it made them for this mechanism."""
    of, codes = getattr(keys, "_codes", (None, None))
    return codes if of is mechanism else None


def _keep_codes(keys: Tensor, mechanism: Mechanism, codes: KeyCodes) -> None:
    keys._codes = mechanism, codes  # type: ignore[attr-defined]


def _codes(mechanism: Any) -> bool:
    if not isinstance(mechanism, Mechanism):
        return False
    device = next((p.device for p in mechanism.parameters()), None)
    return mechanism.codes_of(torch.zeros(1, 1, 1, mechanism.head_dim, device=device)) is not None
