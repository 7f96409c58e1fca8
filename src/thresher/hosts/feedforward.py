"""A host for feed-forward layers of any library, described by the names of their parts.

A description says which children hold the projections. Since it goes by names, each mount is checked: with all
units kept the host must compute what the original computes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from thresher.attention.topk_ffn import Projection, TopKFeedForward
from thresher.hosts.core import Host, MakeFeedForward


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
                    f"{_name(original)}.{name} is a {type(getattr(original, name, None)).__name__}; "
                    "a feed-forward layer of which units are kept needs an nn.Linear there"
                )
        act = getattr(original, activation)
        if isinstance(act, nn.Module) and any(True for _ in act.parameters()):
            raise TypeError(f"the activation of {_name(original)} has parameters, which would receive no gradient")
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
            (weight, bias), halves = inner[0], range(2)
            biases = [None, None] if bias is None else bias.chunk(2)
            inner = [Projection(weight.chunk(2)[i], biases[i]) for i in halves]
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
        x = torch.randn(4, 1, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        training = self.training
        everything = TopKFeedForward(keys=1.0).eval()
        try:
            self.original.eval()
            self.eval()
            with torch.no_grad():
                assert_close(self._through(x, everything), self.original(x))
        except AssertionError as error:
            raise TypeError(
                f"{_name(self.original)} computes something of its own besides projections and an activation"
            ) from error
        finally:
            self.original.train(training)
            self.train(training)


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
