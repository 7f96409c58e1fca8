"""Whether a mechanism can decode: go on with a few queries where the keys of earlier tokens were cached."""

import torch

from thresher.attention.base import Call, MakeMechanism
from thresher.hosts.recording import Seen


def decodes(make: MakeMechanism, seen: Seen, tokens: int = 24, last: int = 3) -> bool:
    """Return whether the last rows computed alone are those of the whole, tried on random inputs on a CPU."""
    with torch.random.fork_rng([]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        mechanism = make(num_heads=seen.num_heads, head_dim=seen.head_dim, pattern=seen.pattern).eval()
        if mechanism.needs_source:
            return False
        q, k, v = torch.randn(3, 1, seen.num_heads, tokens, seen.head_dim)
        whole = mechanism(q, k, v, Call()).out
        try:
            alone = mechanism(q[:, :, -last:], k, v, Call()).out
        except (ValueError, RuntimeError):
            return False
    return torch.allclose(alone, whole[:, :, -last:], atol=1e-4, rtol=1e-4)
