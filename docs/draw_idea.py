"""Draw docs/idea.svg from a trained checkpoint: `python docs/draw_idea.py runs/.../checkpoints/best.ckpt`."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from thresher.attention.shared.thresholds import Thresholds
from thresher.checkpoints.format import STATE
from thresher.checkpoints.rebuild import PROJECT_CONF
from thresher.checkpoints.weights import load_weights
from thresher.run.build import build_data, build_task
from thresher.run.overrides import load_with_overrides


def main(path: str) -> None:
    cfg, checkpoint, _ = load_with_overrides(Path(path), [], PROJECT_CONF)
    data = build_data(cfg)
    task = build_task(cfg, data)
    load_weights(task, checkpoint[STATE], other_attention=False)
    task.eval()
    seen: dict[str, torch.Tensor] = {}
    thresholds = {name: m for name, m in task.net.named_modules() if isinstance(m, Thresholds)}
    for name, module in thresholds.items():
        module.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0]))
    images, _ = next(iter(data.val_dataloader()))
    with torch.no_grad():
        task.net(images)
    # The two heads whose thresholds lie farthest apart, in one layer.
    values = {name: module.values().detach() for name, module in thresholds.items()}
    layer = max(values, key=lambda name: float(values[name].max() - values[name].min()))
    theta = values[layer]
    heads = [int(theta.argmin()), int(theta.argmax())]
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.9), layout="constrained", width_ratios=[2.2, 1, 2.2, 1])
    for column, head in enumerate(heads):
        difference = seen[layer][:, head].flatten().numpy()
        kept = float((difference <= float(theta[head])).mean())
        bars, square = axes[2 * column], axes[2 * column + 1]
        _, edges, patches = bars.hist(difference, bins=60, color="#c9ced6")
        for edge, patch in zip(edges, patches, strict=False):
            if edge < float(theta[head]):
                patch.set_facecolor("#2a6fdb")
        bars.axvline(float(theta[head]), color="#d1495b", lw=2)
        bars.set_title(f"head {head}: θ = {float(theta[head]):.2f}, keeps {kept:.0%}", fontsize=10)
        bars.set_xlabel("max S − S, nats" if thresholds[layer].unit == "nats" else "(max S − S) / (max S − mean S)")
        bars.set_yticks([])
        square.imshow(seen[layer][0, head] <= theta[head], cmap="Blues", vmin=0, vmax=1.2)
        square.set_title("kept pairs of an image", fontsize=10)
        square.set_xlabel("key")
        square.set_ylabel("query")
        square.set_xticks([])
        square.set_yticks([])
    figure.savefig(Path(__file__).parent / "idea.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1])
