"""Host for models of transformers whose attention goes through its registry, `AttentionInterface`.

One attention function and one mask function are registered under one name; no forward is copied and no architecture is
named here. A recorded forward shows which modules reach the registry, and what kind of attention each of them is. The
mechanism becomes a child of the attention module, so that state dicts hold its parameters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers import PreTrainedConfig as Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.versions import require_version

from thresher.attention.base import Call, MakeMechanism, Pattern
from thresher.hosts.core import FINDERS, Build, Found, Guest
from thresher.hosts.decoding import decodes
from thresher.hosts.examples import example_inputs_of
from thresher.hosts.huggingface_cache import kept_codes
from thresher.hosts.huggingface_switch import NAME, Switch
from thresher.hosts.masks import add_biases, read_mask, rescale
from thresher.hosts.projections import Projection, Projections
from thresher.hosts.recipes import complete, make_of, recipe_of, seen_of
from thresher.hosts.recording import Recording, Seen, evaluating, hides_future, run

require_version("transformers>=5.20", "pip install 'thresher[hf]'")  # masks are asked for by length since then

_UNSUPPORTED = ("softcap", "s_aux")
_recorder: "_Recorder | None" = None


class _Refused(ValueError):
    """Attention of a kind that no mechanism knows."""


class HuggingFaceAttention(Guest):
    """A mechanism inside an attention module of transformers.

    Args:
        module: The attention module.
        make: Builds the mechanism.
        name: The module's name in its model.
        seen: What a recorded call told.
        switch: Of that model.
        projection: What its values are projected by, where that is known.
    """

    def __init__(
        self,
        module: nn.Module,
        make: MakeMechanism,
        name: str,
        seen: Seen,
        switch: Switch,
        projection: Projection | None = None,
    ) -> None:
        mechanism = make(num_heads=seen.num_heads, head_dim=seen.head_dim, pattern=seen.pattern)
        super().__init__(module, mechanism)
        self.name, self.switch, self.recipe = name, switch, recipe_of(make, seen)
        self.decodes = seen.pattern is not Pattern.CAUSAL_SELF or decodes(make, seen)
        self.projection = projection if mechanism.needs_source else None
        if mechanism.needs_source and projection is None:
            raise ValueError(
                f"{type(mechanism).__name__} needs to know what values are projected from, and those of "
                f"{type(module).__name__} are not the plain output of a linear layer in it; choose another mechanism, "
                "or leave this module out by `where`"
            )

    def enter(self) -> None:
        if "_guest" not in self.module.__dict__:
            self.switch.turn_on()
            self.switch.note(self.name, self.recipe)
            if self.projection is not None:
                self.projection.watch()
        super().enter()

    def restore(self) -> nn.Module:
        if self.module.__dict__.get("_guest") is self:
            self.switch.turn_off()
            self.switch.note(self.name, None)
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
    ) -> Tensor:
        """Attend with masks as `make_mask` makes them, or four-dimensional ones of the user's."""
        mechanism, pattern, (b, _, n, _), m = self.mechanism, self.mechanism.pattern, query.shape, key.shape[2]
        by_rule = mask is None or mask.ndim == 2
        _check_pattern(self.module, pattern, by_rule, is_causal, n, m, mask)
        if pattern is Pattern.CAUSAL_SELF and n < m and not self.decodes:
            raise ValueError(
                f"{type(mechanism).__name__} cannot go on from cached keys: its last rows depend on earlier queries; "
                "pass use_cache=False"
            )
        if self.module.training and mechanism.dropout != dropout:
            mechanism.dropout = dropout
        own = mask is not None and (mask.ndim == 2 or (n > 1 and mask.stride(2) == 0))
        keys, pairs, bias = (mask, None, None) if mask is not None and mask.ndim == 2 else read_mask(mask, b, n, m)
        if position_bias is not None:
            position_bias = position_bias.expand(-1, -1, n, m)
        call = Call(
            queries=keys[:, m - n :] if own and keys is not None and not pattern.cross else None,
            keys=keys,
            pairs=pairs,
            bias=add_biases(bias, position_bias),
            source=None if self.projection is None else self.projection.source(b, m),
            codes=kept_codes(key, mechanism),
        )
        return mechanism(rescale(query, scaling), key, value, call).out


def _check_pattern(
    module: nn.Module, pattern: Pattern, by_rule: bool, is_causal: bool, n: int, m: int, mask: Tensor | None
) -> None:
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
    if pattern is Pattern.CAUSAL_SELF and not by_rule and mask is not None and mask.stride(2) == 0:
        raise ValueError(f"this attention was mounted as {where} and is called with a mask that is not causal")


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
) -> tuple[Tensor, None]:
    """Answer the call of an attention module; the function that is registered."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    guest = module.__dict__.get("_guest")
    if given := [name for name in _UNSUPPORTED if kwargs.get(name) is not None]:
        raise _Refused(f"{type(module).__name__} attends with {', '.join(given)}, which no mechanism knows")
    if guest is None:
        if _recorder is not None:
            _recorder.arrived.append(attention_mask)
            _recorder.note(module, query, key, value, attention_mask, causal)
        mask = _as_pairs(attention_mask, query, key, causal)
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout, scaling, is_causal, position_bias, **kwargs
        )
    out = guest.attend(query, key, value, attention_mask, dropout, scaling, causal, position_bias)
    return out.transpose(1, 2).contiguous(), None


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
    """Make a mask, True where visible; the function that is registered.

    Padding alone stays of linear size: [b, m] in causal attention, where the module says that it is causal, or one row
    that stands for all queries, [b, 1, n, m]. Any other pattern is a whole mask of pairs.
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


def _as_pairs(mask: Tensor | None, q: Tensor, k: Tensor, causal: bool) -> Tensor | None:
    """Return a mask of ours as PyTorch's attention takes it, for modules that hold no mechanism."""
    n, m = q.shape[2], k.shape[2]
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None].expand(-1, -1, n, -1)
    elif mask is not None or not causal or n in (1, m):
        return mask
    past = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)[None, None]
    return past if mask is None else mask & past if causal else mask


class _Recorder:
    """Notes which modules reach the registry, and what their values are projected by."""

    def __init__(self) -> None:
        self.recording = Recording()
        self.projections = Projections(Conv1D)
        self.of_values: dict[nn.Module, Projection | None] = {}
        self.made: list[Tensor | None] = []
        self.arrived: list[Tensor | None] = []

    def note(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> None:
        (_, h, n, d), m = q.shape, k.shape[2]
        causal = causal if mask is None else hides_future(mask)
        self.recording.add(module, h, d, n, m, causal=causal)
        self.of_values[module] = self.projections.behind(v, module)

    def strayed(self) -> bool:
        """Say whether a mask was made that reached no attention function, nor did a view of it."""
        made, arrived = (
            {mask.untyped_storage().data_ptr() for mask in masks if mask is not None}
            for masks in (self.made, self.arrived)
        )
        return bool(made - arrived)


@contextmanager
def _recording(switch: Switch) -> Iterator[_Recorder]:
    global _recorder
    _recorder = _Recorder()
    switch.turn_on()
    try:
        with _recorder.projections.watching():
            yield _recorder
    finally:
        _recorder = None
        switch.turn_off()


def find(model: nn.Module, example_inputs: Any) -> Found:
    """Find the attention modules of every model of transformers in `model` that reach the registry."""
    builds: dict[str, Build] = {}
    trials, refused = [], []
    for place, root in _roots(model):
        if not _routes(root):
            refused.append(f"{type(root).__name__} does not call transformers' AttentionInterface.")
            continue
        switch = _switch_of(root)
        whole, given = (root, example_inputs_of(root)) if example_inputs is None else (model, example_inputs)
        with _recording(switch) as recorder, evaluating(whole):
            try:
                run(whole, given)
            except _Refused:
                raise
            except Exception as error:
                raise ValueError(
                    f"{type(root).__name__} could not be run to see where it attends; give example_inputs ({error})"
                ) from error
        seen = recorder.recording.seen
        if recorder.strayed() and not all(m._supports_sdpa for m in switch.models):
            raise ValueError(
                f"{type(root).__name__} attends in part without asking transformers' AttentionInterface, and adds "
                "masks to its scores there: with boolean masks, as mechanisms need them, that part would see padding"
            )
        if differing := [n for n, m in root.named_modules() if m in recorder.recording.differing]:
            raise ValueError(f"{', '.join(differing)} is called in more than one pattern; example_inputs may avoid it")
        for name, module in root.named_modules(remove_duplicate=False):
            if module in seen:
                full = f"{place}.{name}" if place else name
                build = partial(HuggingFaceAttention, module, name=name, seen=seen[module], switch=switch)
                builds[full] = partial(build, projection=recorder.of_values[module])
        trials.append(partial(_try_out, whole, given))
    known = given if trials and example_inputs is None and isinstance(model, PreTrainedModel) else None
    return Found(builds, partial(_each, trials), " ".join(refused), known)


def _roots(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """Return the outermost models of transformers, by name."""
    roots: list[tuple[str, PreTrainedModel]] = []
    for name, module in model.named_modules():
        inner = any(not place or name.startswith(f"{place}.") for place, _ in roots)
        if isinstance(module, PreTrainedModel) and not inner:
            roots.append((name, module))
    return roots


def _routes(root: PreTrainedModel) -> bool:
    """Return whether any model in `root` asks the registry, which transformers itself reads off the source."""
    return any(isinstance(m, PreTrainedModel) and type(m)._can_set_attn_implementation() for m in root.modules())


def _switch_of(root: PreTrainedModel) -> Switch:
    guests = (module.__dict__.get("_guest") for module in root.modules())
    return next((guest.switch for guest in guests if guest is not None), None) or Switch(root)


def _try_out(model: nn.Module, example_inputs: Any) -> None:
    """Run a model once with its mechanisms, and with the attention dropout that training will ask for."""
    with evaluating(model):
        for module in model.modules():
            if "_guest" in module.__dict__:
                module.training = True
        run(model, example_inputs)


def _each(trials: list[Any]) -> None:
    for trial in trials:
        trial()


def from_pretrained(path: str, **kwargs: Any) -> PreTrainedModel:
    """Load a model that was saved with mechanisms in it, and their parameters.

    The class's own `from_pretrained` loads the dense model.

    Args:
        path: What `save_pretrained` wrote, or a name on the hub.
        **kwargs: For the `from_pretrained` of the class that the configuration names.

    Raises:
        ValueError: No mechanism was saved there, or none that thresher knows.
    """
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    recipes = getattr(config, NAME, None)
    if not recipes:
        raise ValueError(f"{path} was saved without mechanisms; load it as a dense model, then call sparsify()")
    base = getattr(transformers, str((config.architectures or [""])[0]), None)
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        raise ValueError(f"{path} names {config.architectures} as its architecture, which is no model of transformers")

    def init(model: PreTrainedModel, config: Config, *args: Any, **settings: Any) -> None:
        base.__init__(model, config, *args, **settings)
        switch = Switch(model)
        for name, recipe in recipes.items():
            module = model.get_submodule(name)
            HuggingFaceAttention(module, make_of(recipe), name, seen_of(recipe), switch).enter()

    sparse: Any = type(base.__name__, (base,), {"__init__": init, "__module__": base.__module__})
    model, info = sparse.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    if missing := complete(model, info["missing_keys"]):
        raise ValueError(f"{path} says that it holds mechanisms, and lacks their parameters: {', '.join(missing)}")
    return model


FINDERS["huggingface"] = find
