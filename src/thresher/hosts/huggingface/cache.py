"""A cache for generation that keeps codes of keys and sums for tails, so that a step reads only its own token."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from thresher.attention.contract import KeyCodes, Pattern
from thresher.attention.mechanism import Mechanism
from thresher.attention.shared.sums import RunningSums
from thresher.hosts.core import Guest


def coded_cache(model: PreTrainedModel) -> Cache:
    """Build an empty cache for `generate` or `forward` of a model of transformers.

    It is the growing cache of such models, with what a mechanism keeps of the keys beside them: low-precision codes
    (about a quarter of the keys' memory in fp32), and sums for tails. Tokens stay the same, and steps take less time:
    docs/speed.md.

    Raises:
        ValueError: No mechanism in the model keeps codes or sums of its cached keys.
    """
    cache = DynamicCache(config=model.config)
    coded = 0
    for module in model.modules():
        guest, index = module.__dict__.get("_guest"), getattr(module, "layer_idx", None)
        if not isinstance(guest, Guest) or index is None or not _keeps_more(guest.mechanism):
            continue
        if type(cache.layers[index]) is DynamicLayer:
            cache.layers[index] = CodedLayer(guest.mechanism)
            coded += 1
    if not coded:
        raise ValueError(
            f"no attention of this {type(model).__name__} keeps codes or sums of keys that it caches: latte does in "
            "causal self attention over a whole sequence, with estimate.bits a number and estimate.scoring=exact, and "
            "so does topk with tail=mean. Use the model's own cache"
        )
    return EncoderDecoderCache(cache, DynamicCache(config=model.config)) if model.config.is_encoder_decoder else cache


class CodedLayer(DynamicLayer):
    """The growing keys and values of one layer, the codes of the keys, and running sums for a tail.

    Codes and sums belong to one tensor of keys. If another tensor replaces it without them, all tokens are read again.
    """

    def __init__(self, mechanism: Mechanism) -> None:
        super().__init__()
        self.mechanism = mechanism

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        old, sums = find_codes(self.keys, self.mechanism), find_sums(self.keys) or RunningSums()
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        keys._sums = sums  # type: ignore[attr-defined]
        new = self.mechanism.encode_keys(keys if old is None else key_states)
        if new is not None:
            codes = new if old is None else KeyCodes(*(torch.cat(both, 2) for both in zip(old, new, strict=True)))
            _attach_codes(keys, self.mechanism, codes)
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        codes, sums = find_codes(self.keys, self.mechanism), find_sums(self.keys) or RunningSums()
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # annotated as LongTensor
        if self.keys is not None:
            self.keys._sums = sums.select(beam_idx)  # type: ignore[attr-defined]
        if codes is not None and self.keys is not None:
            kept = KeyCodes(*(x.index_select(0, beam_idx.to(x.device)) for x in codes))
            _attach_codes(self.keys, self.mechanism, kept)


def find_codes(keys: Tensor | None, mechanism: Mechanism) -> KeyCodes | None:
    """Find the codes of keys that a `CodedLayer` keeps for this mechanism; None without any."""
    of, codes = getattr(keys, "_codes", (None, None))
    return codes if of is mechanism else None


def find_sums(keys: Tensor | None) -> RunningSums | None:
    """Find the running sums that a `CodedLayer` keeps for its keys; None without any."""
    return getattr(keys, "_sums", None)


def _attach_codes(keys: Tensor, mechanism: Mechanism, codes: KeyCodes) -> None:
    keys._codes = mechanism, codes  # type: ignore[attr-defined]


def _keeps_more(mechanism: Any) -> bool:
    if not isinstance(mechanism, Mechanism):
        return False
    has_tail = getattr(mechanism, "tail", None) is not None
    if mechanism.reads_sums and has_tail and mechanism.pattern is Pattern.CAUSAL_SELF:
        return True
    device = next((p.device for p in mechanism.parameters()), None)
    return mechanism.encode_keys(torch.zeros(1, 1, 1, mechanism.head_dim, device=device)) is not None
