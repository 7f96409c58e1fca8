"""Find out whether a mechanism can decode: attend with a few queries over the cached keys of earlier tokens."""

import torch

from thresher.attention.contract import Call
from thresher.attention.mechanism import MakeMechanism
from thresher.hosts.recording import Usage


def can_decode(make: MakeMechanism, usage: Usage, tokens: int = 24, last: int = 3) -> bool:
    """Tell whether the last rows, computed alone, equal those of the whole sequence, on random inputs on the CPU."""
    with torch.random.fork_rng([]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        mechanism = make(num_heads=usage.num_heads, head_dim=usage.head_dim, pattern=usage.pattern).eval()
        if mechanism.needs_source:
            return False
        q, k, v = torch.randn(3, 1, usage.num_heads, tokens, usage.head_dim)
        whole = mechanism(q, k, v, Call()).out
        try:
            alone = mechanism(q[:, :, -last:], k, v, Call()).out
        except (ValueError, RuntimeError):
            return False
    return torch.allclose(alone, whole[:, :, -last:], atol=1e-4, rtol=1e-4)
