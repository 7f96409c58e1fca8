"""Compare the embeddings of a network under another attention with its own."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional import spearman_corrcoef

from thresher.budget.meter import ComputeMeter
from thresher.budget.ratio import ComputeRatio
from thresher.data.sequences import SequenceData


def draw_texts(data: SequenceData, loader: DataLoader[Any], count: int, seed: int) -> list[Int64[Tensor, "b n"]]:
    """Draw `count` texts of a loader at random; return their tokens in batches padded to the longest text.

    Raises:
        ValueError: There are fewer texts, or fewer than two are wanted.
    """
    texts: Any = loader.dataset
    if not 2 <= count <= len(texts):
        raise ValueError(f"{count} texts are wanted of {len(texts)}: change dropin.texts or dropin.calibration")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    starts = range(0, count, data.batch_size)
    return [data.collate([texts[i] for i in order[start : start + data.batch_size]])[0] for start in starts]


@torch.no_grad()
def embed(net: nn.Module, batches: list[Tensor], device: torch.device) -> Float[Tensor, "n c"]:
    """Embed texts, in fp64 on the CPU."""
    return torch.cat([net(tokens.to(device)).double().cpu() for tokens in batches])


def embed_and_meter(
    net: nn.Module, batches: list[Tensor], device: torch.device
) -> tuple[Float[Tensor, "n c"], dict[str, float]]:
    """Embed texts; return the embeddings, and the kept share and the compute of attention."""
    meter = ComputeMeter(net)
    ratios = {"kept": ComputeRatio("kept").to(device), "compute": ComputeRatio("macs").to(device)}
    parts = []
    for tokens in batches:
        with meter:
            parts.append(embed(net, [tokens], device))
        for ratio in ratios.values():
            ratio.update(meter.costs())
    return torch.cat(parts), {name: float(ratio.compute()) for name, ratio in ratios.items()}


def compare_embeddings(found: Float[Tensor, "n c"], dense: Float[Tensor, "n c"]) -> dict[str, float]:
    """Compare embeddings of length 1 with those of the dense network.

    Returns:
        `cosine`: mean cosine of each with its own dense one; `moved`: 1 - cosine, exactly 0 for equal ones;
        `spearman`: rank correlation of the similarities of all pairs of texts.
    """
    moved = float((found - dense).square().sum(-1).mean() / 2)
    upper = torch.triu_indices(len(found), len(found), offset=1)
    similar = [(e @ e.mT)[upper[0], upper[1]] for e in (found, dense)]
    return {"cosine": 1 - moved, "moved": moved, "spearman": float(spearman_corrcoef(*similar))}
