"""Models that a user could name: functions that return them with example inputs."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.attention import broken
from thresher.attention.dense import Dense
from thresher.hosts import inject
from thresher.models.transformer import LanguageModel


def encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 40, 0.0, batch_first=True)
    hidden = torch.zeros(2, 40, dtype=torch.bool)
    hidden[1, 20:] = True
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return net, {"src": torch.randn(2, 40, 32), "src_key_padding_mask": hidden}


def decoder(make: Any = None) -> tuple[nn.Module, Tensor]:
    make = make or Dense
    torch.manual_seed(0)
    sizes = {"vocabulary": 20, "length": 32, "dim": 16, "depth": 2, "num_heads": 2, "ffn_dim": 24}
    net = LanguageModel(make, causal=True, **sizes)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net, torch.randint(1, 20, (3, 24), generator=torch.Generator().manual_seed(0))


@broken.breaks_output
def averages_padding(s: broken.Seen) -> Tensor:
    return s.out + s.v.mean(2, keepdim=True)


@broken.breaks_output
def sees_one_token_ahead(s: broken.Seen) -> Tensor:
    return s.out + s.v.roll(-1, 2)


def shows_padding() -> tuple[nn.Module, dict[str, Tensor]]:
    net, inputs = encoder()
    inject(net, averages_padding)
    return net, inputs


def shows_the_future() -> tuple[nn.Module, Tensor]:
    return decoder(sees_one_token_ahead)


def shows_neighbours() -> tuple[nn.Module, Tensor]:
    return decoder(broken.centres_over_the_batch)


class Forgetful(nn.Module):
    """Takes a mask and forgets it."""

    def forward(self, src: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        return src + src.mean(1, keepdim=True)


def forgets_its_mask() -> tuple[nn.Module, dict[str, Tensor]]:
    return Forgetful(), encoder()[1]


def without_inputs() -> nn.Module:
    return Forgetful()
