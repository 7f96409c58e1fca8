"""The meter, the metric and the gradient of the global ratio."""

import socket
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thresher.attention import Call, Cost, Pattern, find
from thresher.budget.meter import ComputeMeter, check_quantity
from thresher.budget.ratio import ComputeRatio


class Twice(nn.Module):
    """Two mechanisms of different cost, the second called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = find("dense")(2, 4, Pattern.NONCAUSAL_SELF)
        self.second = find("latte")(2, 4, Pattern.CAUSAL_SELF, threshold=0.5, tail="none")

    def forward(self, x: Tensor) -> Tensor:
        for mechanism in (self.first, self.second, self.second):
            x = mechanism(x, x, x, Call()).out
        return x


def test_meter_collects_every_call_and_only_while_entered() -> None:
    net = Twice()
    meter = ComputeMeter(net)
    x = torch.randn(3, 2, 6, 4)
    net(x)
    assert meter.calls == []
    with meter:
        net(x)
    net(x)
    assert [name for name, _ in meter.calls] == ["first", "second", "second"]
    with meter:
        net(x)
    assert len(meter.calls) == 3


def test_ratios_weigh_layers_by_what_dense_would_cost() -> None:
    net = Twice()
    meter = ComputeMeter(net)
    with meter:
        net(torch.randn(3, 2, 6, 4))
    costs = [cost.detach() for cost in meter.costs()]
    kept = sum(float(c.kept.sum()) for c in costs) / sum(float(c.visible.sum()) for c in costs)
    macs = sum(float(c.total.sum()) for c in costs) / sum(float(c.dense.sum()) for c in costs)
    assert meter.kept().item() == pytest.approx(kept)
    assert meter.ratio().item() == pytest.approx(macs)
    visible = [float(c.visible.sum()) for c in costs]
    assert visible == [3 * 2 * 36, 3 * 2 * 21, 3 * 2 * 21]


def test_ratio_has_a_gradient_towards_thresholds_only() -> None:
    net = Twice()
    meter = ComputeMeter(net)
    x = torch.randn(3, 2, 6, 4, requires_grad=True)
    with meter:
        net(x)
    meter.ratio().backward()
    offset = net.second.thresholds.offset
    assert offset.grad is not None
    assert (offset.grad > 0).all()
    assert x.grad is None or not x.grad.any()


def test_metric_averages_by_pairs_not_by_batches() -> None:
    def cost(kept: float, visible: float) -> Cost:
        k, v = torch.tensor([[float(kept)]]), torch.tensor([[float(visible)]])
        return Cost(score=k, value=k, select=v, dense=4 * v, kept=k, visible=v)

    kept, macs = ComputeRatio("kept"), ComputeRatio("macs")
    for metric in (kept, macs):
        metric.update([cost(1, 2)])
        metric.update([cost(10, 100), cost(0, 8)])
    assert float(kept.compute()) == pytest.approx(11 / 110)
    assert float(macs.compute()) == pytest.approx((2 * 11 + 110) / 440)


def test_metric_counts_beyond_what_fp32_can_add() -> None:
    many = torch.full((1, 1), 2.0**24)
    one = torch.ones(1, 1)
    metric = ComputeRatio("kept")
    metric.update([Cost(many, many, many, many, many, many)])
    for _ in range(4):
        metric.update([Cost(one, one, one, one, one, one)])
    assert metric.dense.item() == 2**24 + 4


def test_nothing_visible_is_no_division_by_zero() -> None:
    zero = torch.zeros(1, 1)
    metric = ComputeRatio()
    metric.update([Cost(zero, zero, zero, zero, zero, zero)])
    assert float(metric.compute()) == 0


def test_fixed_ratio_is_the_price_of_selection() -> None:
    net = nn.Sequential()
    net.add_module("m", find("latte")(2, 8, Pattern.NONCAUSAL_SELF))
    meter = ComputeMeter(net)
    q = torch.randn(2, 2, 5, 8)
    with meter:
        net.m(q, q, q, Call())
    assert meter.fixed_ratio() == pytest.approx(1 / 8)


class Checkpointed(Twice):
    """The same, computed again in backward."""

    use_reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.use_reentrant)


def _offset_gradient(net: Twice, backward_inside: bool) -> tuple[Tensor, Tensor]:
    """Return the ratio and its gradient to thresholds, that of the output included."""
    meter = ComputeMeter(net)
    x = torch.randn(3, 2, 6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with meter:
        out = net(x)
        ratio = meter.kept()
        if backward_inside:
            (out.sum() + ratio).backward()
    if not backward_inside:
        (out.sum() + ratio).backward()
    assert [name for name, _ in meter.calls] == ["first", "second", "second"]
    assert net.second.thresholds.offset.grad is not None
    return ratio.detach(), net.second.thresholds.offset.grad


@pytest.mark.parametrize("backward_inside", [False, True])
def test_a_forward_that_checkpointing_repeats_counts_once_and_keeps_its_gradient(backward_inside: bool) -> None:
    wanted = _offset_gradient(Twice(), backward_inside)
    torch.testing.assert_close(_offset_gradient(Checkpointed(), backward_inside), wanted)


@pytest.mark.parametrize("quantity", ["kept", "macs"])
def test_a_gradient_that_checkpointing_loses_is_refused_when_it_is_wanted(quantity: Literal["kept", "macs"]) -> None:
    net = Checkpointed()
    net.use_reentrant = True
    meter, x = ComputeMeter(net), torch.randn(3, 2, 6, 4, requires_grad=True)
    with meter:
        out = net(x)
        out.sum().backward()  # which computes the forward again
    assert len(meter.calls) == 3
    assert 0 < float(meter.ratio(quantity).detach()) < 1, "a number can be had"
    with pytest.raises(ValueError, match="set use_reentrant=False"):
        (meter.ratio(quantity) ** 2).backward()
    net.second.thresholds.offset.requires_grad_(False)
    with meter:
        net(x)
    assert not meter.ratio(quantity).requires_grad, "nothing could have had a gradient"


def test_a_measurement_without_gradients_is_a_number_like_any_other() -> None:
    net = Twice()
    meter, x = ComputeMeter(net), torch.randn(3, 2, 6, 4)
    with meter, torch.no_grad():
        net(x)
    assert not meter.kept().detach().requires_grad
    with torch.no_grad(), meter:
        net(x)
    assert not meter.kept().requires_grad


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="sparsify"):
        ComputeMeter(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="kept, macs"):
        check_quantity("flops")
    with pytest.raises(ValueError, match="with meter"):
        ComputeMeter(Twice()).ratio()


def _ratio_of_a_process(rank: int, world: int, port: int, results: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        net = Twice()
        meter = ComputeMeter(net)
        x = torch.randn(3 + 2 * rank, 2, 6, 4, generator=torch.Generator().manual_seed(rank))
        with meter:
            net(x)
        ratio = meter.ratio("kept")
        ratio.backward()
        grad = net.second.thresholds.offset.grad
        torch.distributed.all_reduce(grad)
        torch.save((ratio.detach(), grad / world), f"{results}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_processes_with_unequal_batches_agree_with_one_process(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_ratio_of_a_process, (2, free_port, str(tmp_path)), nprocs=2)
    net = Twice()
    meter = ComputeMeter(net)
    x = torch.cat([torch.randn(3 + 2 * r, 2, 6, 4, generator=torch.Generator().manual_seed(r)) for r in range(2)])
    # One scale for each token, so that two halves of a batch are quantised as the whole is; dense is stateless.
    with meter:
        net(x)
    ratio = meter.ratio("kept")
    ratio.backward()
    for rank in range(2):
        value, grad = torch.load(f"{tmp_path}/{rank}.pt", weights_only=True)
        torch.testing.assert_close(value, ratio.detach())
        torch.testing.assert_close(grad, net.second.thresholds.offset.grad)


def test_a_frozen_tower_does_not_take_the_gradient_of_the_rest() -> None:
    net = nn.ModuleList([Twice(), Twice()])
    meter, x = ComputeMeter(net), torch.randn(3, 2, 6, 4)
    with meter:
        with torch.no_grad():
            seen = net[0](x)
        net[1](seen)
    with pytest.warns(UserWarning, match=r"does not reach 0\.second: measured"):
        ratio = meter.kept()
    ratio.backward()
    assert net[1].second.thresholds.offset.grad is not None
    assert net[0].second.thresholds.offset.grad is None
