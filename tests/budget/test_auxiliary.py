"""Auxiliary losses on their way from a mechanism to the loss: names, weights, means and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thresher.attention import Attended, Call, Pattern
from thresher.attention.dense import Dense
from thresher.attention.prepared import Prepared
from thresher.budget.auxiliary import choose_weights, collect_weights, sum_losses
from thresher.budget.meter import ComputeMeter

SEE_ALL = Call()


class Wishing(Dense):
    """Dense attention that wants the projections of its keys to be short."""

    auxiliary = {"length": 0.25}

    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__(num_heads, head_dim, pattern)
        self.project = nn.Parameter(torch.randn(head_dim, generator=torch.Generator().manual_seed(0)))

    def reference(self, x: Prepared) -> Attended:
        attended = super().reference(x)
        if not torch.is_grad_enabled():
            return attended
        return attended._replace(losses={"length": (x.k.detach() @ self.project).square().mean(-1)})


class Net(nn.Module):
    """Two mechanisms with a loss, the second called twice, and one without."""

    def __init__(self, wrap: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.plain = Dense(2, 4, Pattern.CAUSAL_SELF)
        self.first, self.second = (Wishing(2, 4, Pattern.NONCAUSAL_SELF) for _ in range(2))
        self.wrap = wrap

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x) if self.wrap is None else self.wrap(self.attend, x)

    def attend(self, x: Tensor) -> Tensor:
        for mechanism in (self.plain, self.first, self.second, self.second):
            x = mechanism(x, x, x, SEE_ALL).out
        return x


def run(net: nn.Module) -> tuple[ComputeMeter, Tensor]:
    meter = ComputeMeter(net)
    x = torch.randn(3, 2, 6, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with meter:
        out = net(x)
    return meter, out


def take_gradients(net: Net) -> list[Tensor]:
    meter, out = run(net)
    (out.sum() + sum_losses(meter.losses(), meter.weights)).backward()
    return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]


def test_a_loss_is_the_mean_over_calls_heads_and_examples() -> None:
    net = Net()
    meter, _ = run(net)
    assert meter.weights == {"length": 0.25}
    found = meter.losses()
    each = []

    def read(module: Any, args: Any, attended: Attended) -> None:
        each.append(attended.losses["length"])

    for module in (net.first, net.second):
        module.register_forward_hook(read)
    run(net)
    assert len(each) == 3
    torch.testing.assert_close(found["length"], torch.cat(each).mean())
    assert take_gradients(net)[0].any()


def test_what_checkpointing_repeats_counts_once_and_keeps_its_gradient() -> None:
    wanted = take_gradients(Net())
    assert len(wanted) == 2
    torch.testing.assert_close(take_gradients(Net(lambda f, x: checkpoint(f, x, use_reentrant=False))), wanted)


def test_losses_that_checkpointing_hides_are_refused() -> None:
    meter, _ = run(Net(lambda f, x: checkpoint(f, x, use_reentrant=True)))
    with pytest.raises(ValueError, match=r"first, second ran under torch\.no_grad\(\).*use_reentrant=False"):
        meter.losses()


def test_an_evaluation_has_no_losses() -> None:
    with torch.no_grad():
        meter, _ = run(Net())
    assert meter.losses() == {}
    assert sum_losses({}, meter.weights) == 0


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_compiled_network_has_the_same_losses() -> None:
    net = Net()
    wanted = run(net)[0].losses()["length"]
    meter, x = ComputeMeter(net), torch.randn(3, 2, 6, 4, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with meter:
        compiled(x)
    torch.testing.assert_close(meter.losses()["length"], wanted)


def test_a_weight_may_be_given_by_name() -> None:
    stated = {"length": 0.25, "spread": 1.0}
    assert choose_weights(stated, None) == stated
    weights = choose_weights(stated, {"length": 2})
    assert weights == {"length": 2.0, "spread": 1.0}
    assert float(sum_losses({"length": torch.tensor(3.0)}, weights)) == 6
    assert sum_losses({"length": torch.tensor(3.0)}, choose_weights(stated, {"length": 0})) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"lenght": 1.0},
            r"task\.auxiliary\.lenght: there is no such auxiliary loss; did you mean .*\.length",
        ),
        ({"length": -1.0}, r"task\.auxiliary\.length must be a finite number, at least 0"),
        ({"length": "much"}, r"task\.auxiliary\.length must be a finite number"),
    ],
    ids=str,
)
def test_other_names_and_weights_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_weights({"length": 0.25}, given, "task.auxiliary")
    with pytest.raises(ValueError, match="none: no mechanism of the network has one"):
        choose_weights({}, {"length": 1.0})


def test_one_name_has_one_weight() -> None:
    other = Wishing(2, 4, Pattern.NONCAUSAL_SELF)
    other.auxiliary = {"length": 1.0}
    with pytest.raises(ValueError, match=r"length by 1, another module by .* a name has one weight"):
        collect_weights([Wishing(2, 4, Pattern.NONCAUSAL_SELF), other])
