"""A leak through the masks of a model is measured where its outputs can be compared, and only there."""

import pytest
import torch
from torch import Tensor, nn

from thresher.testing.models import Change, Subject, find_leaks, measure_leak, measure_leaks

BEFORE = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
AFTER = torch.cat([BEFORE[:, :2], BEFORE[:, 2:] + 1], 1)
FUTURE = Change("future", BEFORE, AFTER, torch.tensor([True, True, False, False]).expand(2, -1), None)


def subject(run: nn.Module) -> Subject:
    return Subject(run, run, [FUTURE])


class Averages(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


def test_a_model_that_mixes_tokens_is_found_out() -> None:
    moved = measure_leaks(subject(Averages()), [FUTURE])
    assert moved["future"] > 0.1
    assert find_leaks(moved) == ["future"]


def test_a_model_that_keeps_tokens_apart_does_not_move() -> None:
    moved = measure_leaks(subject(nn.ReLU()), [FUTURE])
    assert moved == {"future": 0.0}
    assert find_leaks(moved) == []


def test_outputs_of_another_shape_say_nothing() -> None:
    assert measure_leak(subject(nn.Flatten()), FUTURE) is None


def test_an_output_that_is_no_number_is_a_leak() -> None:
    assert find_leaks({"padding": float("nan"), "future": 1e-6, "neighbours": 1e-4}) == ["padding", "neighbours"]


@pytest.mark.parametrize("hidden", [True, False])
def test_noise_replaces_embeddings_while_it_is_entered(hidden: bool) -> None:
    torch.manual_seed(0)
    net, ids = nn.Embedding(5, 3), torch.tensor([[1, 2], [3, 4]])
    before = net(ids)
    noise = torch.tensor([[False, hidden], [False, False]])
    moved = measure_leak(Subject(net, net, []), Change("padding", ids, ids, torch.ones(2, 2).bool(), None, noise))
    assert (moved == 0) is not hidden
    assert torch.equal(net(ids), before)
