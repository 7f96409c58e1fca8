"""Host for any module that calls `F.scaled_dot_product_attention`: that one call goes to the mechanism.

Such modules have no class in common. One forward on example inputs finds them.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from thresher.attention.base import Call, MakeMechanism, Pattern
from thresher.hosts.core import FINDERS, Build, Found, holder, known
from thresher.hosts.masks import read_mask, rescale, seen_queries
from thresher.hosts.recording import Recording, Seen, evaluating, hides_future, run
from thresher.hosts.wrapper import Wrapper


class SdpaAttention(Wrapper):
    """A module whose `F.scaled_dot_product_attention` is a mechanism.

    Args:
        original: The module.
        make: Builds the mechanism.
        seen: What a recorded call told.
    """

    def __init__(self, original: nn.Module, make: MakeMechanism, seen: Seen) -> None:
        mechanism = make(num_heads=seen.num_heads, head_dim=seen.head_dim, pattern=seen.pattern)
        if mechanism.needs_source:
            raise ValueError(
                f"{type(mechanism).__name__} needs to know what values are projected from, and a call of "
                f"F.scaled_dot_product_attention in {type(original).__name__} does not say; choose another mechanism, "
                "or leave this module out by `where`"
            )
        super().__init__(original, mechanism)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
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
        """Attend as the function does that this stands for."""
        _check_shapes(query, key, enable_gqa)
        (b, _, n, _), m = query.shape, key.shape[2]
        pattern = self.mechanism.pattern
        _check_pattern(pattern, n, m, is_causal, attn_mask)
        if dropout_p and not self.training:
            raise ValueError(f"dropout_p={dropout_p:g} outside of training; pass it only while self.training is True")
        if self.training and self.mechanism.dropout != dropout_p:
            self.mechanism.dropout = dropout_p
        keys, pairs, bias = read_mask(attn_mask, b, n, m)
        call = Call(queries=seen_queries(self.mechanism, keys, n), keys=keys, pairs=pairs, bias=bias)
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
        raise ValueError(f"attention over [batch, heads, tokens, features] is what mechanisms know, got {q.ndim} axes")
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
    """Notes which module calls `F.scaled_dot_product_attention`, and lets it compute."""

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
        causal = is_causal or (attn_mask is not None and hides_future(attn_mask))
        (_, h, n, d), m = query.shape, key.shape[2]
        self.recording.add(module, h, d, n, m, causal=causal)

    def enter(self, module: nn.Module, *_: Any) -> None:
        self.stack.append(module)

    def leave(self, *_: Any) -> None:
        self.stack.pop()


def record(model: nn.Module, example_inputs: Any, skip: set[nn.Module]) -> _Recorder:
    """Run a model once and note which modules attend, but for those in `skip`."""
    recorder, handles = _Recorder(skip), []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(recorder.enter))
        handles.append(module.register_forward_hook(recorder.leave, always_call=True))
    try:
        with evaluating(model), recorder:
            run(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return recorder


def find(model: nn.Module, example_inputs: Any) -> Found:
    """Find the modules that call `F.scaled_dot_product_attention`, where no other host knows them."""
    if example_inputs is None:
        return Found({})
    others = [module for module in model.modules() if known(module) or holder(module) is not None]
    recorder = record(model, example_inputs, {inner for module in others for inner in module.modules()})
    seen = recorder.recording.seen
    refused = recorder.refused | dict.fromkeys(recorder.recording.differing, "its calls differ in heads or pattern")
    if model in seen:
        refused[model] = "it attends in its own forward, outside of any submodule; put attention into a module"
    builds: dict[str, Build] = {
        name: partial(SdpaAttention, module, seen=seen[module])
        for name, module in model.named_modules(remove_duplicate=False)
        if module in seen and module not in refused
    }
    reasons = [f"{type(m).__module__}.{type(m).__qualname__} is refused: {why}." for m, why in refused.items()]
    return Found(builds, partial(_try_out, model, example_inputs), " ".join(reasons))


def _try_out(model: nn.Module, example_inputs: Any) -> None:
    """Run a model once with its mechanisms, and with the attention dropout that training will ask for."""
    with evaluating(model):
        for module in model.modules():
            if isinstance(module, SdpaAttention):
                module.training = True
        run(model, example_inputs)


FINDERS["sdpa"] = find
