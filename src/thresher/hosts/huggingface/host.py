"""Host for models of transformers that call its registry of attention functions, `AttentionInterface`.

One attention function and one mask function are registered under one name; no forward is copied and no architecture is
named. A recorded forward shows which modules call the registry, and in which pattern. The mechanism becomes a child of
the attention module, so that state dicts hold its parameters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.versions import require_version

from thresher.attention.contract import Call, Pattern
from thresher.attention.maps import one_hot_like
from thresher.attention.mechanism import MakeMechanism
from thresher.hosts.core import FINDERS, RESTORERS, Build, Findings, Guest
from thresher.hosts.decoding import can_decode
from thresher.hosts.examples import build_example_inputs
from thresher.hosts.huggingface.cache import find_codes, find_sums
from thresher.hosts.huggingface.saving import find_roots, from_pretrained
from thresher.hosts.huggingface.switch import NAME, Switch, is_asked_for_weights
from thresher.hosts.masks import (
    MaskParts,
    add_biases,
    check_mask_pattern,
    find_order,
    hides_future,
    read_mask,
    rescale,
)
from thresher.hosts.projections import Projection, Projections
from thresher.hosts.recipes import read_usage, restore_make
from thresher.hosts.recording import Recording, Usage, call_model, evaluation_mode
from thresher.hosts.weights import attend_with_weights

require_version("transformers>=5.20", "pip install 'thresher[hf]'")  # the first version that asks for masks by length

__all__ = ["HuggingFaceAttention", "attend", "find", "from_pretrained", "make_mask"]
_UNSUPPORTED = ("softcap", "s_aux")
_recorder: "_Recorder | None" = None


class _UnsupportedAttention(ValueError):
    """Attention of a kind that no mechanism supports."""


class HuggingFaceAttention(Guest):
    """A mechanism inside an attention module of transformers.

    Args:
        module: The attention module.
        make: Builds the mechanism.
        usage: From a recorded call.
        switch: Of the model.
        projection: The projection of the values, if it is known.
    """

    kind = "huggingface"

    def __init__(
        self,
        module: nn.Module,
        make: MakeMechanism,
        usage: Usage,
        switch: Switch,
        projection: Projection | None = None,
    ) -> None:
        mechanism = make(num_heads=usage.num_heads, head_dim=usage.head_dim, pattern=usage.pattern)
        super().__init__(module, mechanism)
        self.switch = switch
        self.decodes = usage.pattern is not Pattern.CAUSAL_SELF or can_decode(make, usage)
        self.projection = projection if mechanism.needs_source else None
        if mechanism.needs_source and projection is None:
            raise ValueError(
                f"{type(mechanism).__name__} needs to know what values are projected from, and those of "
                f"{type(module).__name__} are not the plain output of a linear layer in it; choose another mechanism, "
                "or leave this module out by `where`"
            )
        self.recipe = None if self.projection is None else {"projection": self.projection.words}

    @property
    def idle(self) -> str:
        return self.switch.idle

    def enter(self) -> None:
        if "_guest" not in self.module.__dict__:
            self.switch.turn_on()
            self.switch.serve(self.module)
            if self.projection is not None:
                self.projection.watch()
        super().enter()

    def restore(self) -> nn.Module:
        if self.module.__dict__.get("_guest") is self:
            self.switch.turn_off()
            if self.projection is not None:
                self.projection.forget()
        return super().restore()

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,
        scaling: float | None,
        is_causal: bool,
        position_bias: Tensor | None,
        window: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with a mask of `make_mask`, or a four-dimensional one of the user."""
        mechanism, pattern, (b, _, n, _), m = self.mechanism, self.mechanism.pattern, query.shape, key.shape[2]
        by_rule = mask is None or mask.ndim == 2
        _check_pattern(self.module, pattern, by_rule, is_causal, n, m)
        if mask is not None and not by_rule:
            check_mask_pattern(mechanism, mask, n, m)
        if pattern is Pattern.CAUSAL_SELF and n < m and not self.decodes:
            raise ValueError(
                f"{type(mechanism).__name__} cannot continue from cached keys: its last rows depend on earlier "
                "queries; pass use_cache=False"
            )
        if not mechanism.slides and window is not None and m == window - 1 + n:  # a full cache has this length
            raise ValueError(
                f"{type(mechanism).__name__} counts the tokens of a sequence, and a cache that keeps {window} has "
                "dropped some; pass use_cache=False"
            )
        if self.module.training and mechanism.dropout != dropout:
            mechanism.dropout = dropout
        own = mask is not None and (mask.ndim == 2 or (n > 1 and mask.stride(2) == 0))
        masked = MaskParts(keys=mask) if by_rule else read_mask(mask, b, n, m)
        keys = masked.keys
        if position_bias is not None:
            position_bias = position_bias.expand(-1, -1, n, m)
        call = Call(
            queries=keys[:, m - n :] if own and keys is not None and not pattern.cross else None,
            keys=keys,
            pairs=masked.pairs,
            bias=add_biases(masked.bias, position_bias),
            source=None if self.projection is None else self.projection.build_source(b, m),
            codes=find_codes(key, mechanism),
            sums=find_sums(key) if n == 1 else None,
            **({} if by_rule else find_order(masked, pattern, n, m)),
        )
        query = rescale(query, scaling)
        if is_asked_for_weights():
            return attend_with_weights(self.module.mechanism, query, key, value, call)  # type: ignore[arg-type]
        return self.module.mechanism(query, key, value, call).out, None  # type: ignore[operator]


def _check_pattern(module: nn.Module, pattern: Pattern, by_rule: bool, is_causal: bool, n: int, m: int) -> None:
    where = pattern.name.lower()
    if not pattern.cross and n != m and not (pattern.causal and n < m):
        raise ValueError(f"this attention was mounted as {where} and is called with {n} queries and {m} keys")
    if n == 1:
        return
    if by_rule and is_causal != (pattern.causal and not pattern.cross):
        if pattern.causal and getattr(module, "is_causal", None) is False:
            raise ValueError(
                f"{type(module).__name__} is given masks that hide the future and has is_causal=False, so a call "
                "without a mask could mean either; where it is always causal, set is_causal=True on these modules, or "
                "leave them out by `where`"
            )
        kind = "causal" if is_causal else "not causal"
        raise ValueError(f"this attention was mounted as {where} and is called as {kind}; give such example inputs")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of a module; registered in `AttentionInterface`."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    guest = module.__dict__.get("_guest")
    if given := [name for name in _UNSUPPORTED if kwargs.get(name) is not None]:
        raise _UnsupportedAttention(
            f"{type(module).__name__} attends with {', '.join(given)}, which no mechanism supports"
        )
    if guest is None:
        if _recorder is not None:
            _recorder.arrived.append(attention_mask)
            _recorder.note(module, query, key, value, attention_mask, causal)
        mask = _expand_mask(attention_mask, query, key, causal)
        dense = partial(sdpa_attention_forward, module, query, key, scaling=scaling, position_bias=position_bias)
        out, _ = dense(value, mask, dropout, is_causal=is_causal, **kwargs)
        if not is_asked_for_weights():
            return out, None
        if dropout and module.training:
            raise ValueError(f"{type(module).__name__} drops attention weights in training; ask for them in evaluation")
        with torch.no_grad():
            return out, dense(one_hot_like(value), mask, is_causal=is_causal, **kwargs)[0].transpose(1, 2)
    window = kwargs.get("sliding_window")
    out, weights = guest.attend(query, key, value, attention_mask, dropout, scaling, causal, position_bias, window)
    return out.transpose(1, 2).contiguous(), weights


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Make a mask, True where visible; registered in `AttentionMaskInterface`.

    Padding alone stays of linear size: [b, m] in causal attention, or one row expanded to all queries, [b, 1, n, m].
    Any other pattern is a mask of pairs.
    """
    padding = None
    if attention_mask is not None:
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        assert padding is not None
        padding = padding[:, kv_offset : kv_offset + kv_length]
    if _recorder is None:
        last = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
        if mask_function is causal_mask_function and last:
            return padding
        if mask_function is bidirectional_mask_function:
            return None if padding is None else padding[:, None, None].expand(-1, -1, q_length, -1)
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask=attention_mask, **kwargs
    )
    if _recorder is not None:
        _recorder.made.append(mask)
    return mask


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)


def _expand_mask(mask: Tensor | None, q: Tensor, k: Tensor, causal: bool) -> Tensor | None:
    """Expand a mask of `make_mask` for PyTorch's attention, in modules that hold no mechanism."""
    n, m = q.shape[2], k.shape[2]
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None].expand(-1, -1, n, -1)
    elif mask is not None or not causal or n in (1, m):
        return mask
    past = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)[None, None]
    return past if mask is None else mask & past if causal else mask


class _Recorder:
    """Records which modules call the registry, and the projections of their values."""

    def __init__(self) -> None:
        self.recording = Recording()
        self.projections = Projections(Conv1D)
        self.value_projections: dict[nn.Module, Projection | None] = {}
        self.made: list[Tensor | None] = []
        self.arrived: list[Tensor | None] = []

    def note(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> None:
        (_, h, n, d), m = q.shape, k.shape[2]
        causal = causal if mask is None else bool(hides_future(mask))
        self.recording.add(module, h, d, n, m, causal=causal)
        self.value_projections[module] = self.projections.find(v, module)

    def has_stray_mask(self) -> bool:
        """Tell whether some mask reached no attention function, not even as a view."""
        made, arrived = (
            {mask.untyped_storage().data_ptr() for mask in masks if mask is not None}
            for masks in (self.made, self.arrived)
        )
        return bool(made - arrived)


@contextmanager
def _record(switch: Switch) -> Iterator[_Recorder]:
    global _recorder
    _recorder = _Recorder()
    switch.turn_on()
    try:
        with _recorder.projections.record():
            yield _recorder
    finally:
        _recorder = None
        switch.turn_off()


def find(model: nn.Module, example_inputs: Any) -> Findings:
    """Find the attention modules that call the registry, in every model of transformers inside `model`."""
    builds: dict[str, Build] = {}
    trials, refused = [], []
    for place, root in find_roots(model):
        if not _uses_registry(root):
            refused.append(f"{type(root).__name__} does not call transformers' AttentionInterface.")
            continue
        switch = _find_switch(root)
        whole, given = (root, build_example_inputs(root)) if example_inputs is None else (model, example_inputs)
        with _record(switch) as recorder, evaluation_mode(whole):
            try:
                call_model(whole, given)
            except _UnsupportedAttention:
                raise
            except Exception as error:
                raise ValueError(
                    f"{type(root).__name__} could not be run to see where it attends; give example_inputs ({error})"
                ) from error
        usages = recorder.recording.usages
        if recorder.has_stray_mask() and not all(m._supports_sdpa for m in switch.models):
            raise ValueError(
                f"{type(root).__name__} attends in part without asking transformers' AttentionInterface, and adds "
                "masks to its scores there: with boolean masks, as mechanisms need them, that part would see padding"
            )
        if differing := [n for n, m in root.named_modules() if m in recorder.recording.differing]:
            raise ValueError(f"{', '.join(differing)} is called in more than one pattern; example_inputs may avoid it")
        for name, module in root.named_modules(remove_duplicate=False):
            if module in usages:
                full = f"{place}.{name}" if place else name
                build = partial(HuggingFaceAttention, module, usage=usages[module], switch=switch)
                builds[full] = partial(build, projection=recorder.value_projections[module])
        trials.append((whole, given))
    known = given if trials and example_inputs is None and isinstance(model, PreTrainedModel) else None
    return Findings(builds, tuple(trials), " ".join(refused), known)


def _uses_registry(root: PreTrainedModel) -> bool:
    """Tell whether any model in `root` calls the registry, as transformers finds in its source."""
    return any(isinstance(m, PreTrainedModel) and type(m)._can_set_attn_implementation() for m in root.modules())


def _find_switch(root: PreTrainedModel) -> Switch:
    guests = (module.__dict__.get("_guest") for module in root.modules())
    return next((guest.switch for guest in guests if guest is not None), None) or Switch(root)


def _restore(model: nn.Module, name: str, module: nn.Module, recipe: dict[str, Any]) -> HuggingFaceAttention:
    assert isinstance(model, PreTrainedModel)
    projection = Projection.from_words(module, recipe["projection"]) if "projection" in recipe else None
    return HuggingFaceAttention(module, restore_make(recipe), read_usage(recipe), _find_switch(model), projection)


FINDERS["huggingface"] = find
RESTORERS["huggingface"] = _restore
