"""Mechanisms that break the contract through what they own: parameters, buffers, memory of earlier calls."""

import torch
from torch import Tensor, nn

from tests.attention.broken import Around
from thresher.attention import Attended, Call, Pattern


class WithThreshold(Around):
    """Dense attention with a parameter for each head that is added to the output."""

    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__(num_heads, head_dim, pattern)
        self.threshold = nn.Parameter(torch.full((num_heads,), -1.0))

    def shift(self) -> Tensor:
        return self.threshold

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        attended = self.whole(q, k, v, call)
        return attended._replace(out=attended.out + self.shift()[:, None, None])


class DeadThreshold(WithThreshold):
    def shift(self) -> Tensor:
        return self.threshold.clamp_min(0)


class UnusedThreshold(WithThreshold):
    def shift(self) -> Tensor:
        return self.threshold.detach()


class ThresholdDeadInOneHead(WithThreshold):
    def shift(self) -> Tensor:
        return self.threshold * (torch.arange(self.num_heads) == 0)


class InfiniteGradient(WithThreshold):
    def shift(self) -> Tensor:
        return (self.threshold + 1).sqrt()


class ScalarThreshold(WithThreshold):
    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__(num_heads, head_dim, pattern)
        self.threshold = nn.Parameter(torch.tensor(1.0))


class ThresholdInBf16(WithThreshold):
    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__(num_heads, head_dim, pattern)
        self.threshold = nn.Parameter(torch.ones(num_heads, dtype=torch.bfloat16))


class CountsCalls(Around):
    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__(num_heads, head_dim, pattern)
        self.register_buffer("calls", torch.zeros(()))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        self.calls += 1
        return self.whole(q, k, v, call)


class RemembersTheLastCall(Around):
    last = 0.0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        attended = self.whole(q, k, v, call)
        out = attended.out + self.last * 1e-9
        self.last = attended.out.abs().max().item()
        return attended._replace(out=out)


class ForgetsABuffer(Around):
    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__(num_heads, head_dim, pattern)
        self.register_buffer("shift", torch.zeros(()), persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        attended = self.whole(q, k, v, call)
        return attended._replace(out=attended.out + self.shift)


class RefusesDenseCheckpoints(WithThreshold):
    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__(num_heads, head_dim, pattern)
        self._load_state_dict_pre_hooks.clear()


class AcceptsPartOfItself(WithThreshold):
    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__(num_heads, head_dim, pattern)
        self.base = nn.Parameter(torch.ones(num_heads))
        self.register_load_state_dict_pre_hook(self.fill_in)

    @staticmethod
    def fill_in(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        for name, own in module.state_dict(prefix=prefix).items():
            state.setdefault(name, own)


class ResetsOnDenseCheckpoints(WithThreshold):
    def __init__(self, num_heads: int, head_dim: int, pattern: Pattern) -> None:
        super().__init__(num_heads, head_dim, pattern)
        self.register_load_state_dict_pre_hook(self.reset)

    @staticmethod
    def reset(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        state[f"{prefix}threshold"] = torch.zeros(module.num_heads)
