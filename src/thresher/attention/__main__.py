"""Print the table of mechanisms in README: `python -m thresher.attention`."""

import sys

import torch

from thresher.attention import Call, Mechanism, Pattern, ValueSource, available, find
from thresher.console import end_command

HEAD = ("attention=", "what it keeps", *(p.name.lower().replace("_", " ") for p in Pattern), "budget", "random")


def can_build(mechanism: type[Mechanism], pattern: Pattern) -> bool:
    """Check whether a mechanism can be built in a pattern."""
    try:
        mechanism(num_heads=2, head_dim=4, pattern=pattern)
    except ValueError:
        return False
    return True


def follows_budget(mechanism: type[Mechanism]) -> bool:
    """Check, by one call, whether the cost of a mechanism has a gradient."""
    pattern = next(p for p in Pattern if can_build(mechanism, p))
    q, k, v = torch.randn(3, 1, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    source = ValueSource(v.transpose(1, 2).flatten(2), torch.eye(8), None) if mechanism.needs_source else None
    attended = mechanism(num_heads=2, head_dim=4, pattern=pattern)(q, k, v, Call(source=source))
    return attended.cost.total.requires_grad


def summarize(mechanism: type[Mechanism]) -> str:
    """Extract the first sentence of the method card of a mechanism."""
    card = sys.modules[mechanism.__module__].__doc__ or ""
    return card.partition("\n\n")[0].replace("\n", " ").partition(": ")[2].rstrip(".")


def build_table() -> str:
    """Build the table as Markdown."""
    rows = [HEAD, ("---",) * len(HEAD)]
    for name in available():
        mechanism = find(name)
        patterns = ("yes" if can_build(mechanism, p) else "no" for p in Pattern)
        budget = "trained" if follows_budget(mechanism) else "fixed"
        rows.append((f"`{name}`", summarize(mechanism), *patterns, budget, "yes" if mechanism.stochastic else "no"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    end_command(lambda: print(build_table()))
