"""Host for `nn.MultiheadAttention`, and with it for `nn.TransformerEncoderLayer` and its relatives.

In evaluation these modules have fast paths that would pass the mechanism by; an attention that says that its
projections differ in size (`_qkv_same_embed_dim`) and encoders that use no nested tensors close them.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.attention.base import Call, MakeMechanism, Pattern, ValueSource
from thresher.hosts.core import FINDERS, Build, Found, Host, mount
from thresher.hosts.masks import Masked, add_biases, read_mask
from thresher.hosts.recording import Recording, evaluating, hides_future, run
from thresher.hosts.wrapper import Wrapper


class MultiheadAttention(Wrapper):
    """PyTorch's multi-head attention around a mechanism.

    Args:
        original: The module.
        make: Builds the mechanism.
        pattern: Where it is used.
        encoders: The encoders that it stands in, and whether they used nested tensors.
    """

    _qkv_same_embed_dim = False

    def __init__(
        self,
        original: nn.MultiheadAttention,
        make: MakeMechanism,
        pattern: Pattern = Pattern.NONCAUSAL_SELF,
        encoders: tuple[tuple[nn.TransformerEncoder, bool], ...] = (),
    ) -> None:
        if original.bias_k is not None or original.add_zero_attn:
            raise ValueError("nn.MultiheadAttention with add_bias_kv or add_zero_attn adds keys that no mask speaks of")
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
    ) -> tuple[Tensor, None]:
        """Attend as `nn.MultiheadAttention` does, masks True or -inf where hidden; there are no weights to return."""
        if need_weights:
            raise ValueError("a mechanism has no matrix of attention weights to return; leave need_weights out")
        if query.is_nested:
            raise ValueError("nested tensors are not supported; set use_nested_tensor=False on the encoder")
        batched, first, same = query.ndim == 3, self.batch_first, query is key
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        (b, n, _), m = query.shape, key.shape[1]
        self._check(same, n, attn_mask, is_causal)
        keys, pairs, bias = self._masks(b, n, m, key_padding_mask, None if is_causal else attn_mask)
        call = Call(
            queries=None if key_padding_mask is None or not same else self._masks(b, n, m, key_padding_mask, None)[0],
            keys=keys,
            pairs=pairs,
            bias=bias,
            source=ValueSource(value, *self._projections()[2]) if self.mechanism.needs_source else None,
        )
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, (weight, bias) in zip((query, key, value), self._projections(), strict=True)
        )
        out = self.out_proj(self.mechanism(q, k, v, call).out.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], None
        return out if first else out.transpose(0, 1), None

    def _projections(self) -> list[tuple[Tensor, Tensor | None]]:
        """Return the weights and biases of queries, keys and values."""
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return list(zip(weights, biases, strict=True))

    def _check(self, same: bool, n: int, attn_mask: Tensor | None, is_causal: bool) -> None:
        pattern = self.mechanism.pattern
        where = pattern.name.lower()
        if pattern.cross == same:
            raise ValueError(f"this attention was mounted as {where}; example_inputs show what it is used for")
        if is_causal and pattern is not Pattern.CAUSAL_SELF:
            raise ValueError(f"this attention was mounted as {where} and is called as causal; give such example inputs")
        if pattern is Pattern.CAUSAL_SELF and attn_mask is None and not is_causal and n > 1:
            raise ValueError(f"this attention was mounted as {where} and is called without a causal mask")

    def _masks(self, b: int, n: int, m: int, padding: Tensor | None, attn_mask: Tensor | None) -> Masked:
        """Combine both masks. One that is_causal describes is not among them: the pattern says the same."""
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (b, self.num_heads))
        one = read_mask(None if padding is None else _shown(padding).view(b, 1, 1, m), b, n, m)
        other = read_mask(None if attn_mask is None else _shown(attn_mask), b, n, m)
        keys = one.keys if other.keys is None else other.keys if one.keys is None else one.keys & other.keys
        return Masked(keys, other.pairs, add_biases(one.bias, other.bias))


def _shown(mask: Tensor) -> Tensor:
    """Turn a mask that is True where hidden into one that is True where visible; additive ones stay."""
    return ~mask if mask.dtype == torch.bool else mask


@mount.register
def _(module: nn.MultiheadAttention, make: MakeMechanism) -> Host:
    if type(module).forward is not nn.MultiheadAttention.forward:
        raise TypeError(f"{type(module).__name__} computes something of its own; this host knows nn.MultiheadAttention")
    return MultiheadAttention(module, make)


def find(model: nn.Module, example_inputs: Any) -> Found:
    """Find every `nn.MultiheadAttention`: noncausal self attention, unless a forward on example inputs shows more."""
    modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if type(m) is nn.MultiheadAttention}
    if not modules:
        return Found({})
    recording = Recording()
    if example_inputs is not None:
        _record(model, example_inputs, recording)
    builds: dict[str, Build] = {}
    for name, module in modules.items():
        encoders = tuple(
            (encoder, _used_nested(encoder))
            for place, encoder in model.named_modules()
            if isinstance(encoder, nn.TransformerEncoder) and (not place or name.startswith(f"{place}."))
        )
        if module in recording.differing:
            raise ValueError(f"{name} is called in more than one pattern; leave it out by `where`")
        pattern = recording.seen[module].pattern if module in recording.seen else Pattern.NONCAUSAL_SELF
        builds[name] = partial(MultiheadAttention, module, pattern=pattern, encoders=encoders)
    return Found(builds)


def _used_nested(encoder: nn.TransformerEncoder) -> bool:
    hosts = (m for m in encoder.modules() if isinstance(m, MultiheadAttention))
    return next((nested for host in hosts for e, nested in host._encoders if e is encoder), encoder.use_nested_tensor)


def _record(model: nn.Module, example_inputs: Any, recording: Recording) -> None:
    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        mask, query, key = given.get("attn_mask"), given["query"], given["key"]
        causal = given.get("is_causal", False) or (mask is not None and hides_future(_shown(mask)))
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
        with evaluating(model):
            run(model, example_inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()


FINDERS["multihead"] = find
