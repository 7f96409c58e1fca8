"""A host for feed-forward layers of any library, described by the names of their parts.

A description says which children hold the projections. Since it goes by names, each mount is checked: with all
units kept the host must compute what the original computes.
"""

import re
import sys
from collections.abc import Callable
from functools import singledispatch
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from thresher.attention.topk_ffn import Projection, TopKFeedForward
from thresher.hosts.core import Host, holding, load_hosts, qualified_name, replace

FEED_FORWARD = {"topk_ffn": TopKFeedForward}
MakeFeedForward = Callable[[], TopKFeedForward]


@singledispatch
def mount_feed_forward(module: nn.Module, make: MakeFeedForward) -> Host:
    """Return a module that computes what `module` does, with the feed-forward layer that `make` builds.

    Raises:
        TypeError: No overload knows this kind of module.
    """
    _load()
    if _knows(module):
        return mount_feed_forward(module, make)
    raise TypeError(f"no host knows {qualified_name(type(module))}; mountable: {_mountable()}")


def inject_feed_forward(model: nn.Module, make: MakeFeedForward, *, where: str | None = None) -> list[str]:
    """Mount `make` into every feed-forward module of `model` that a host knows, in place.

    Args:
        model: Any model.
        make: Builds what runs inside, once for each module.
        where: Regular expression that a module's dotted name must contain; all of them by default.

    Returns:
        The names of the modules that were replaced.

    Raises:
        ValueError: Nothing matched, or the model already holds a mechanism there.
        TypeError: A module computes something else than its class promises.
    """
    _load()
    modules = dict(model.named_modules(remove_duplicate=False))
    taken = holding(model, FeedForwardHost.part)
    if any(where is None or re.search(where, name) for name in taken):
        raise ValueError("the model already holds mechanisms there; call densify() first")
    known = [name for name, module in modules.items() if _knows(module)]
    names = [name for name in known if where is None or re.search(where, name)]
    if not names and known + taken:
        raise ValueError(f"no feed-forward module matches {where!r}; there are: {', '.join(known + taken)}")
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no feed-forward module that a host knows. Known: {_mountable()}, "
            "and the layers of BERT, T5 and Llama kind of transformers"
        )
    hosts = {module: mount_feed_forward(module, make) for module in dict.fromkeys(modules[name] for name in names)}
    for name in names:
        replace(model, name, hosts[modules[name]])
    return names


def _load() -> None:
    load_hosts()
    if "transformers" in sys.modules:
        import_module("thresher.hosts.huggingface_ffn").register_loaded()


def _knows(module: nn.Module) -> bool:
    return mount_feed_forward.dispatch(type(module)) is not mount_feed_forward.dispatch(object)


def _mountable() -> str:
    return ", ".join(qualified_name(cls) for cls in mount_feed_forward.registry if cls is not object)


class FeedForwardHost(Host):
    """A feed-forward layer around `TopKFeedForward`.

    Args:
        original: The layer replaced.
        make: Builds what runs inside.
        inner: Name of the inner projection; of two, the first is activated and multiplies the second.
        outer: Name of the outer projection; None for layers that hand their hidden units on.
        activation: Name of the activation.
        dropout: Name of the dropout of hidden units, if the layer has one.
        packed: One inner projection holds both: "gate first" or "gate last".
        after: Name of what follows the outer projection, if anything.

    Raises:
        TypeError: A projection is no plain `nn.Linear`, the activation has parameters, or the layer computes something
            else than the description says.
    """

    part = "feed-forward"
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
                    f"{qualified_name(type(original))}.{name} is a {type(getattr(original, name, None)).__name__}; "
                    "a feed-forward layer of which units are kept needs an nn.Linear there"
                )
        act = getattr(original, activation)
        if isinstance(act, nn.Module) and any(True for _ in act.parameters()):
            raise TypeError(
                f"the activation of {qualified_name(type(original))} has parameters, which would receive no gradient"
            )
        p = 0.0 if dropout is None else getattr(original, dropout).p
        super().__init__(original, make(), dropout=p)
        self._inner, self._outer, self._packed, self._after = inner, outer, packed, after
        self._activation: Callable[[Tensor], Tensor] = act
        self._check()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to tokens [..., d]."""
        return self._through(x, self.mechanism)

    def _through(self, x: Tensor, mechanism: TopKFeedForward) -> Tensor:
        inner = [self._projection(name) for name in self._inner]
        if self._packed:
            weight, bias = inner[0]
            biases = (None, None) if bias is None else bias.chunk(2)
            inner = [Projection(*each) for each in zip(weight.chunk(2), biases, strict=True)]
            inner = inner[::-1] if self._packed == "gate last" else inner
        outer = None if self._outer is None else self._projection(self._outer)
        out = mechanism(x, inner, outer, self._activation).out
        return out if self._after is None else self.get_submodule(self._after)(out)

    def _projection(self, name: str) -> Projection:
        linear = self.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return Projection(linear.weight, linear.bias)

    def _check(self) -> None:
        """Compare with the original on a few tokens, all units kept."""
        weight = self._projection(self._inner[0]).weight
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
                assert_close(self._through(x, everything), original(x))
        except AssertionError as error:
            raise TypeError(
                f"{qualified_name(type(original))} computes something of its own besides projections and an activation"
            ) from error
        finally:
            original.train(training)
            self.train(training)
