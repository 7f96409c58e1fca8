"""Host for `nn.MultiheadAttention`, and with it for `nn.TransformerEncoderLayer` and its relatives.

In evaluation these modules have fast paths that skip the mechanism. They are off if the projections differ in size
(`_qkv_same_embed_dim`) and if encoders use no nested tensors.
"""

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.attention.contract import Call, Pattern, ValueSource
from thresher.attention.mechanism import MakeMechanism
from thresher.hosts.core import FINDERS, RESTORERS, Build, Findings, Host, mount
from thresher.hosts.masks import (
    MaskParts,
    add_biases,
    check_mask_pattern,
    find_order,
    hides_future,
    read_mask,
)
from thresher.hosts.recipes import read_usage, restore_make
from thresher.hosts.recording import Recording, call_model, evaluation_mode
from thresher.hosts.tracing import create_leaf, find_proxy
from thresher.hosts.weights import attend_with_weights
from thresher.hosts.wrapper import Wrapper

_log = logging.getLogger(__name__)


class MultiheadAttention(Wrapper):
    """PyTorch's multi-head attention around a mechanism.

    Args:
        original: The module.
        make: Builds the mechanism.
        pattern: Of the attention.
        encoders: The encoders around the module, and whether they used nested tensors.
    """

    kind = "multihead"
    _qkv_same_embed_dim = False

    def __init__(
        self,
        original: nn.MultiheadAttention,
        make: MakeMechanism,
        pattern: Pattern = Pattern.NONCAUSAL_SELF,
        encoders: tuple[tuple[nn.TransformerEncoder, bool], ...] = (),
    ) -> None:
        if original.bias_k is not None or original.add_zero_attn:
            raise ValueError("nn.MultiheadAttention with add_bias_kv or add_zero_attn adds keys that no mask covers")
        mechanism = make(num_heads=original.num_heads, head_dim=original.head_dim, pattern=pattern)
        super().__init__(original, mechanism)
        mechanism.dropout = original.dropout
        self._encoders = encoders

    def enter(self) -> None:
        for encoder, _ in self._encoders:
            encoder.use_nested_tensor = False

    def restore(self) -> nn.Module:
        module = super().restore()
        for encoder, nested in self._encoders:
            others = (m for m in encoder.modules() if isinstance(m, MultiheadAttention) and m is not self)
            encoder.use_nested_tensor = nested and next(others, None) is None
        return module

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention` does, masks True or -inf where hidden.

        With `need_weights=True` weights are returned, without a gradient: they take a second call of the mechanism, on
        as many columns of values as there are keys.
        """
        if (proxy := find_proxy((query, key, value, key_padding_mask, attn_mask))) is not None:
            given = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return create_leaf(self, proxy, given, {})
        if query.is_nested:
            raise ValueError("nested tensors are not supported; set use_nested_tensor=False on the encoder")
        batched, first, same = query.ndim == 3, self.batch_first, query is key
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        (b, n, _), m = query.shape, key.shape[1]
        self._check(same, n, m, attn_mask, is_causal)
        masked = self._combine_masks(b, n, m, key_padding_mask, None if is_causal else attn_mask)
        call = Call(
            queries=None
            if key_padding_mask is None or not same
            else self._combine_masks(b, n, m, key_padding_mask, None)[0],
            source=ValueSource(value, *self._split_projections()[2]) if self.mechanism.needs_source else None,
            **masked._asdict(),
            **find_order(masked, self.mechanism.pattern, n, m),
        )
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, (weight, bias) in zip((query, key, value), self._split_projections(), strict=True)
        )
        weights = None
        if need_weights:
            attended, weights = attend_with_weights(self.mechanism, q, k, v, call)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            attended = self.mechanism(q, k, v, call).out
        out = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if first else out.transpose(0, 1), weights

    def _split_projections(self) -> list[tuple[Tensor, Tensor | None]]:
        """Split the joint projection into weights and biases of queries, keys and values."""
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return list(zip(weights, biases, strict=True))

    def _check(self, same: bool, n: int, m: int, attn_mask: Tensor | None, is_causal: bool) -> None:
        pattern = self.mechanism.pattern
        where = pattern.name.lower()
        if pattern.cross == same:
            raise ValueError(f"this attention was mounted as {where}; example_inputs show what it is used for")
        if is_causal and pattern is not Pattern.CAUSAL_SELF:
            raise ValueError(f"this attention was mounted as {where} and is called as causal; give such example inputs")
        if pattern is Pattern.CAUSAL_SELF and attn_mask is None and not is_causal and n > 1:
            raise ValueError(f"this attention was mounted as {where} and is called without a causal mask")
        if attn_mask is not None and not is_causal:
            check_mask_pattern(self.mechanism, _invert(attn_mask), n, m)

    def _combine_masks(self, b: int, n: int, m: int, padding: Tensor | None, attn_mask: Tensor | None) -> MaskParts:
        """Combine both masks; the pattern already covers a mask that `is_causal` describes."""
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (b, self.num_heads))
        one = read_mask(None if padding is None else _invert(padding).view(b, 1, 1, m), b, n, m)
        other = read_mask(None if attn_mask is None else _invert(attn_mask), b, n, m)
        keys = one.keys if other.keys is None else other.keys if one.keys is None else one.keys & other.keys
        return MaskParts(keys, other.pairs, add_biases(one.bias, other.bias))


def _invert(mask: Tensor) -> Tensor:
    """Invert a mask that is True where hidden; keep an additive one."""
    return ~mask if mask.dtype == torch.bool else mask


@mount.register
def _(module: nn.MultiheadAttention, make: MakeMechanism) -> Host:
    if type(module).forward is not nn.MultiheadAttention.forward:
        raise TypeError(f"{type(module).__name__} overrides forward; this host supports nn.MultiheadAttention only")
    return MultiheadAttention(module, make)


def find(model: nn.Module, example_inputs: Any) -> Findings:
    """Find every `nn.MultiheadAttention`: noncausal self attention, unless example inputs show another pattern.

    Modules that the example inputs do not reach are left out, as their pattern is unknown.
    """
    modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if type(m) is nn.MultiheadAttention}
    if not modules:
        return Findings({})
    recording = Recording()
    if example_inputs is not None:
        _record(model, example_inputs, recording)
    builds: dict[str, Build] = {}
    left_out: list[str] = []
    for name, module in modules.items():
        if module in recording.differing:
            raise ValueError(f"{name} is called in more than one pattern; leave it out by `where`")
        if example_inputs is not None and module not in recording.usages:
            left_out.append(name)
            continue
        pattern = recording.usages[module].pattern if module in recording.usages else Pattern.NONCAUSAL_SELF
        builds[name] = partial(MultiheadAttention, module, pattern=pattern, encoders=_find_encoders(model, name))
    trials = () if example_inputs is None else ((model, example_inputs),)
    if not left_out:
        return Findings(builds, trials)
    why = f"The example inputs do not reach {', '.join(left_out)}, so that its pattern is unknown."
    _log.warning("%s It stays dense; other example_inputs may reach it", why)
    return Findings(builds, trials, refused=why, left_out=tuple(left_out))


def _find_encoders(model: nn.Module, name: str) -> tuple[tuple[nn.TransformerEncoder, bool], ...]:
    return tuple(
        (encoder, _find_nested_setting(encoder))
        for place, encoder in model.named_modules()
        if isinstance(encoder, nn.TransformerEncoder) and (not place or name.startswith(f"{place}."))
    )


def _restore(model: nn.Module, name: str, module: nn.Module, recipe: dict[str, Any]) -> Host:
    if not isinstance(module, nn.MultiheadAttention):
        raise ValueError(f"it stood in an nn.MultiheadAttention, and a {type(module).__name__} stands there now")
    pattern = read_usage(recipe).pattern
    return MultiheadAttention(module, restore_make(recipe), pattern=pattern, encoders=_find_encoders(model, name))


def _find_nested_setting(encoder: nn.TransformerEncoder) -> bool:
    hosts = (m for m in encoder.modules() if isinstance(m, MultiheadAttention))
    return next((nested for host in hosts for e, nested in host._encoders if e is encoder), encoder.use_nested_tensor)


def _record(model: nn.Module, example_inputs: Any, recording: Recording) -> None:
    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        mask, query, key = given.get("attn_mask"), given["query"], given["key"]
        causal = given.get("is_causal", False) or (mask is not None and bool(hides_future(_invert(mask))))
        along = 0 if query.ndim == 2 or not module.batch_first else 1
        n, m = query.shape[along], key.shape[along]
        recording.add(module, module.num_heads, module.head_dim, n, m, causal=causal, cross=query is not key)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    handles = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in model.modules()
        if type(module) is nn.MultiheadAttention
    ]
    try:
        with evaluation_mode(model):
            call_model(model, example_inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()


FINDERS["multihead"] = find
RESTORERS["multihead"] = _restore
