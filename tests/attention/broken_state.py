"""Mechanisms that break the contract through what they own: parameters, buffers, memory of earlier calls."""

import torch
from torch import Tensor, nn

from thresher.attention import Attended, Call, Pattern
from thresher.attention.dense import Dense


class WithTheta(Dense):
    """Dense attention with a parameter for each head that is added to the output."""

    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__(num_heads, head_dim, pattern)
        self.theta = nn.Parameter(torch.full((num_heads,), -1.0))

    def shift(self) -> Tensor:
        return self.theta

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        attended = super().forward(q, k, v, call)
        return attended._replace(out=attended.out + self.shift()[:, None, None])


class DeadThreshold(WithTheta):
    def shift(self) -> Tensor:
        return self.theta.clamp_min(0)


class UnusedThreshold(WithTheta):
    def shift(self) -> Tensor:
        return self.theta.detach()


class ThresholdDeadInOneHead(WithTheta):
    def shift(self) -> Tensor:
        return self.theta * (torch.arange(self.num_heads) == 0)


class InfiniteGradient(WithTheta):
    def shift(self) -> Tensor:
        return (self.theta + 1).sqrt()


class ScalarThreshold(WithTheta):
    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__(num_heads, head_dim, pattern)
        self.theta = nn.Parameter(torch.tensor(1.0))


class ThresholdInBf16(WithTheta):
    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__(num_heads, head_dim, pattern)
        self.theta = nn.Parameter(torch.ones(num_heads, dtype=torch.bfloat16))


class CountsCalls(Dense):
    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__(num_heads, head_dim, pattern)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        self.calls += 1
        return super().forward(q, k, v, call)


class RemembersTheLastCall(Dense):
    last = 0.0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        attended = super().forward(q, k, v, call)
        out = attended.out + self.last * 1e-9
        self.last = attended.out.abs().max().item()
        return attended._replace(out=out)


class ForgetsABuffer(Dense):
    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__(num_heads, head_dim, pattern)
        self.register_buffer("shift", torch.zeros(()), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        attended = super().forward(q, k, v, call)
        return attended._replace(out=attended.out + self.shift)


class RefusesDenseCheckpoints(WithTheta):
    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__(num_heads, head_dim, pattern)
        self._load_state_dict_pre_hooks.clear()


class AcceptsPartOfItself(WithTheta):
    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__(num_heads, head_dim, pattern)
        self.base = nn.Parameter(torch.ones(num_heads))
        self.register_load_state_dict_pre_hook(self.fill_in)

    @staticmethod
    def fill_in(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        for name, own in module.state_dict(prefix=prefix).items():
            state.setdefault(name, own)


class ResetsOnDenseCheckpoints(WithTheta):
    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__(num_heads, head_dim, pattern)
        self.register_load_state_dict_pre_hook(self.reset)

    @staticmethod
    def reset(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        state[f"{prefix}theta"] = torch.zeros(module.num_heads)
