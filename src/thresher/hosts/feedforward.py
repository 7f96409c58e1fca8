"""Host for feed-forward layers of any library, described by the names of their parts.

A description names the children that hold the projections. As names can mislead, each mount is checked: with all units
kept, the host must compute what the original computes.
"""

import re
import sys
from collections.abc import Callable
from functools import partial, singledispatch
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from thresher.feedforward.topk_ffn import Projection, TopKFeedForward
from thresher.hosts.core import (
    RESTORERS,
    Host,
    find_holders,
    format_class,
    load_hosts,
    notify_watchers,
    record_recipe,
    replace,
)
from thresher.hosts.recipes import FEED_FORWARD
from thresher.hosts.tracing import create_leaf, find_proxy

MakeFeedForward = Callable[[], TopKFeedForward]


@singledispatch
def mount_feed_forward(module: nn.Module, make: MakeFeedForward) -> Host:
    """Build a module that computes what `module` does, with the feed-forward layer that `make` builds.

    Raises:
        TypeError: No overload supports this class.
    """
    _load_hosts()
    if _is_mountable(module):
        return mount_feed_forward(module, make)
    raise TypeError(f"no host knows {format_class(type(module))}; mountable: {_list_mountable()}")


def inject_feed_forward(model: nn.Module, make: MakeFeedForward, *, where: str | None = None) -> list[str]:
    """Mount a layer into every feed-forward module of `model` that a host supports, in place.

    Args:
        model: Any model.
        make: Builds one layer for each module.
        where: Regular expression that a module's dotted name must contain; all of them by default.

    Returns:
        The names of the replaced modules.

    Raises:
        ValueError: Nothing matched, or the model already holds a mechanism there.
        TypeError: A module does not compute what its class name suggests.
    """
    _load_hosts()
    modules = dict(model.named_modules(remove_duplicate=False))
    taken = find_holders(model, FeedForwardHost.part)
    if any(where is None or re.search(where, name) for name in taken):
        raise ValueError("the model already holds mechanisms there; call densify() first")
    known = [name for name, module in modules.items() if _is_mountable(module)]
    names = [name for name in known if where is None or re.search(where, name)]
    if not names and known + taken:
        raise ValueError(f"no feed-forward module matches {where!r}; there are: {', '.join(known + taken)}")
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no feed-forward module that a host knows. Known: {_list_mountable()}, "
            "and the layers of BERT, T5 and Llama kind of transformers"
        )
    hosts = {
        module: record_recipe(mount_feed_forward(module, make), make)
        for module in dict.fromkeys(modules[name] for name in names)
    }
    for name in names:
        replace(model, name, hosts[modules[name]])
    notify_watchers(model)
    return names


def _load_hosts() -> None:
    load_hosts()
    if "transformers" in sys.modules:
        import_module("thresher.hosts.huggingface.feedforward").register_loaded()


def _is_mountable(module: nn.Module) -> bool:
    return mount_feed_forward.dispatch(type(module)) is not mount_feed_forward.dispatch(object)


def _list_mountable() -> str:
    return ", ".join(format_class(cls) for cls in mount_feed_forward.registry if cls is not object)


class FeedForwardHost(Host):
    """A feed-forward layer around `TopKFeedForward`.

    Args:
        original: The layer to replace.
        make: Builds the layer that runs inside.
        inner: Name of the inner projection; of two, the first is activated and multiplies the second.
        outer: Name of the outer projection; None for layers that return their hidden units.
        activation: Name of the activation.
        dropout: Name of the dropout of hidden units, if the layer has one.
        packed: "gate first" or "gate last" if one inner projection holds both.
        after: Name of the module after the outer projection, if any.

    Raises:
        TypeError: A projection is not an `nn.Linear`, the activation has parameters, or the layer does not compute what
            the description says.
    """

    part = "feed-forward"
    kind = "feed-forward"
    mechanism: TopKFeedForward

    def __init__(
        self,
        original: nn.Module,
        make: MakeFeedForward,
        *,
        inner: tuple[str, ...],
        outer: str | None,
        activation: str,
        dropout: str | None = None,
        packed: str | None = None,
        after: str | None = None,
    ) -> None:
        for name in (*inner, *(() if outer is None else (outer,))):
            if type(getattr(original, name, None)) is not nn.Linear:
                raise TypeError(
                    f"{format_class(type(original))}.{name} is a {type(getattr(original, name, None)).__name__}; "
                    "a feed-forward layer of which units are kept needs an nn.Linear there"
                )
        act = getattr(original, activation)
        if isinstance(act, nn.Module) and any(True for _ in act.parameters()):
            raise TypeError(
                f"the activation of {format_class(type(original))} has parameters, which would receive no gradient"
            )
        p = 0.0 if dropout is None else getattr(original, dropout).p
        super().__init__(original, make(), dropout=p)
        self._inner, self._outer, self._packed, self._after = inner, outer, packed, after
        self._activation: Callable[[Tensor], Tensor] = act
        self._check()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to tokens [..., d]."""
        if (proxy := find_proxy((x,))) is not None:
            return create_leaf(self, proxy, (x,), {})
        return self._compute(x, self.mechanism)

    def _compute(self, x: Tensor, mechanism: TopKFeedForward) -> Tensor:
        inner = [self._read_projection(name) for name in self._inner]
        if self._packed:
            weight, bias = inner[0]
            biases = (None, None) if bias is None else bias.chunk(2)
            inner = [Projection(*each) for each in zip(weight.chunk(2), biases, strict=True)]
            inner = inner[::-1] if self._packed == "gate last" else inner
        outer = None if self._outer is None else self._read_projection(self._outer)
        out = mechanism(x, inner, outer, self._activation).out
        return out if self._after is None else self.get_submodule(self._after)(out)

    def _read_projection(self, name: str) -> Projection:
        linear = self.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                f"{name} became a {type(linear).__name__} after the mechanism was mounted, which computes chosen units "
                "of an nn.Linear; leave it out of the adapter's target_modules, or densify()"
            )
        return Projection(linear.weight, linear.bias)

    def _check(self) -> None:
        """Check that the host equals the original on a few tokens, with all units kept."""
        weight = self._read_projection(self._inner[0]).weight
        if weight.is_meta:
            return
        (original,) = self._original
        x = torch.randn(4, 1, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        training = self.training
        everything = TopKFeedForward(keys=1.0).eval()
        try:
            original.eval()
            self.eval()
            with torch.no_grad():
                assert_close(self._compute(x, everything), original(x))
        except AssertionError as error:
            raise TypeError(
                f"{format_class(type(original))} computes more than projections and an activation"
            ) from error
        finally:
            original.train(training)
            self.train(training)


def _restore(model: nn.Module, name: str, module: nn.Module, recipe: dict[str, Any]) -> Host:
    if recipe["attention"] not in FEED_FORWARD:
        raise ValueError(f"there is no feed-forward {recipe['attention']!r}. Available: {', '.join(FEED_FORWARD)}")
    return mount_feed_forward(module, partial(FEED_FORWARD[recipe["attention"]], **recipe["hyperparameters"]))


RESTORERS["feed-forward"] = _restore
