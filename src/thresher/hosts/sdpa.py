"""Host for any module that calls `F.scaled_dot_product_attention`, which then runs the mechanism.

Such modules share no class; one forward on example inputs finds them.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from thresher.attention.contract import Call, Pattern
from thresher.attention.mechanism import MakeMechanism
from thresher.hosts.core import FINDERS, RESTORERS, Build, Findings, find_host, is_mountable
from thresher.hosts.masks import (
    check_mask_pattern,
    find_order,
    find_visible_queries,
    hides_future,
    read_mask,
    rescale,
)
from thresher.hosts.peft import find_running
from thresher.hosts.recipes import read_usage, restore_make
from thresher.hosts.recording import Recording, Usage, call_model, evaluation_mode
from thresher.hosts.tracing import create_leaf, find_proxy
from thresher.hosts.wrapper import Wrapper


class SdpaAttention(Wrapper):
    """A module whose `F.scaled_dot_product_attention` is a mechanism.

    Args:
        original: The module.
        make: Builds the mechanism.
        usage: From a recorded call.
    """

    kind = "sdpa"

    def __init__(self, original: nn.Module, make: MakeMechanism, usage: Usage) -> None:
        mechanism = make(num_heads=usage.num_heads, head_dim=usage.head_dim, pattern=usage.pattern)
        if mechanism.needs_source:
            raise ValueError(
                f"{type(mechanism).__name__} needs to know what values are projected from, and a call of "
                f"F.scaled_dot_product_attention in {type(original).__name__} does not say; choose another mechanism, "
                "or leave this module out by `where`"
            )
        super().__init__(original, mechanism)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if (proxy := find_proxy((*args, *kwargs.values()))) is not None:
            return create_leaf(self, proxy, args, kwargs)
        with _Route(self):
            return self.original(*args, **kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attend as `F.scaled_dot_product_attention` does."""
        _check_shapes(query, key, enable_gqa)
        (b, _, n, _), m = query.shape, key.shape[2]
        pattern = self.mechanism.pattern
        _check_pattern(pattern, n, m, is_causal, attn_mask)
        if dropout_p and not self.training:
            raise ValueError(f"dropout_p={dropout_p:g} outside of training; pass it only while self.training is True")
        if self.training and find_running(self.mechanism).dropout != dropout_p:
            find_running(self.mechanism).dropout = dropout_p
        if attn_mask is not None:
            check_mask_pattern(find_running(self.mechanism), attn_mask, n, m)
        masked = read_mask(attn_mask, b, n, m)
        queries = find_visible_queries(find_running(self.mechanism), masked.keys, n)
        call = Call(queries=queries, **masked._asdict(), **find_order(masked, pattern, n, m))
        return self.mechanism(rescale(query, scale), key, value, call).out


class _Route(TorchFunctionMode):
    """Within it, `F.scaled_dot_product_attention` is the host's; not within the mechanism, which may call it."""

    def __init__(self, host: SdpaAttention) -> None:
        super().__init__()
        self.host = host

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.host.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _check_shapes(q: Tensor, k: Tensor, enable_gqa: bool) -> None:
    if q.ndim != 4:
        raise ValueError(f"mechanisms attend over [batch, heads, tokens, features], got {q.ndim} axes")
    if q.shape[1] != k.shape[1] and not enable_gqa:
        raise ValueError(f"{q.shape[1]} query heads and {k.shape[1]} key heads; sharing keys takes enable_gqa=True")


def _check_pattern(pattern: Pattern, n: int, m: int, is_causal: bool, mask: Tensor | None) -> None:
    where = pattern.name.lower()
    if is_causal and (not pattern.causal or pattern.cross):
        raise ValueError(f"this attention was mounted as {where} and is called as causal; give such example inputs")
    if is_causal and n != m:
        raise ValueError(f"is_causal aligns {n} queries with the first of {m} keys, mechanisms with the last")
    if pattern is Pattern.CAUSAL_SELF and not is_causal and mask is None and n > 1:
        raise ValueError(f"this attention was mounted as {where} and is called without causality")
    if not pattern.cross and n != m and not (pattern.causal and n < m):
        raise ValueError(f"this attention was mounted as {where} and is called with {n} queries and {m} keys")


class _Recorder(TorchFunctionMode):
    """Records which modules call `F.scaled_dot_product_attention`, which computes as usual."""

    def __init__(self, skip: set[nn.Module]) -> None:
        super().__init__()
        self.skip = skip
        self.stack: list[nn.Module] = []
        self.recording = Recording()
        self.refused: dict[nn.Module, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and self.stack and self.stack[-1] not in self.skip:
            self.note(self.stack[-1], *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def note(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        try:
            _check_shapes(query, key, enable_gqa)
        except ValueError as error:
            self.refused[module] = str(error)
            return
        causal = is_causal or (attn_mask is not None and bool(hides_future(attn_mask)))
        (_, h, n, d), m = query.shape, key.shape[2]
        self.recording.add(module, h, d, n, m, causal=causal)

    def enter(self, module: nn.Module, *_: Any) -> None:
        self.stack.append(module)

    def leave(self, *_: Any) -> None:
        self.stack.pop()


def record(model: nn.Module, example_inputs: Any, skip: set[nn.Module]) -> _Recorder:
    """Record which modules of a model attend in one run, except those in `skip`."""
    recorder, handles = _Recorder(skip), []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(recorder.enter))
        handles.append(module.register_forward_hook(recorder.leave, always_call=True))
    try:
        with evaluation_mode(model), recorder:
            call_model(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return recorder


def find(model: nn.Module, example_inputs: Any) -> Findings:
    """Find the modules that call `F.scaled_dot_product_attention` and that no other host supports."""
    if example_inputs is None:
        return Findings({})
    others = [module for module in model.modules() if is_mountable(module) or find_host(module) is not None]
    recorder = record(model, example_inputs, {inner for module in others for inner in module.modules()})
    usages = recorder.recording.usages
    refused = recorder.refused | dict.fromkeys(recorder.recording.differing, "its calls differ in heads or pattern")
    if model in usages:
        refused[model] = "it attends in its own forward, outside of any submodule; put attention into a module"
    builds: dict[str, Build] = {
        name: partial(SdpaAttention, module, usage=usages[module])
        for name, module in model.named_modules(remove_duplicate=False)
        if module in usages and module not in refused
    }
    reasons = [f"{type(m).__module__}.{type(m).__qualname__} is refused: {why}." for m, why in refused.items()]
    return Findings(builds, ((model, example_inputs),), " ".join(reasons))


FINDERS["sdpa"] = find
RESTORERS["sdpa"] = lambda model, name, module, recipe: SdpaAttention(module, restore_make(recipe), read_usage(recipe))
