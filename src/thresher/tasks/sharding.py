"""Fully sharded data parallelism: each process holds a part of every weight, and gathers each block to run it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from thresher.attention.mechanism import Mechanism

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard_network(net: nn.Module, mesh: "DeviceMesh", whole: Iterable[nn.Parameter]) -> None:
    """Shard a network over a mesh, in place and once: each block that holds a mechanism, then the rest.

    Args:
        net: The network; a block is an element of a list or sequence of modules.
        mesh: The processes to spread over, in one dimension.
        whole: Parameters to leave as they are in every process. Their gradients need `average_gradients`.
    """
    if isinstance(net, FSDPModule):
        return
    ignored = set(whole)
    lists = [module for module in net.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    for blocks in reversed(lists):
        for block in blocks:
            is_list = isinstance(block, nn.ModuleList)  # a list has no forward for which to gather weights
            if not is_list and any(isinstance(m, Mechanism) for m in block.modules()):
                fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(net, mesh=mesh, ignored_params=ignored)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average the gradients of whole parameters over all processes, as sharding does for the others."""
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
