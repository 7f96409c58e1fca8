"""Print the table of timm families in docs/hosts.md, from one training step each: `python -m thresher.models`."""

from functools import partial
from typing import Any

import torch

from thresher.attention import find
from thresher.console import end_command
from thresher.hosts import mounted
from thresher.models.build import timm_classifier

MECHANISMS = ("dense", "latte", "topk")
SHALLOW: dict[str, Any] = {"depth": 2}
# A small member of each family with attention: its name, the size of trial images, options.
FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "ViT": ("vit_tiny_patch16_224", 64, SHALLOW),
    "DeiT III": ("deit3_small_patch16_224", 64, SHALLOW),
    "DINOv2": ("vit_small_patch14_dinov2", 56, SHALLOW),
    "DINOv3": ("vit_small_patch16_dinov3", 64, SHALLOW),
    "FlexiViT": ("flexivit_small", 64, SHALLOW),
    "NaFlexViT": ("naflexvit_base_patch16_gap", 64, SHALLOW),
    "ViT with rotary positions": ("vit_small_patch16_rope_224", 64, SHALLOW),
    "ViT with relative positions": ("vit_relpos_small_patch16_224", 64, SHALLOW),
    "ViT with convolutions (R26)": ("vit_small_r26_s32_224", 64, SHALLOW),
    "EVA-02": ("eva02_tiny_patch14_224", 56, SHALLOW),
    "BEiT": ("beit_base_patch16_224", 64, SHALLOW),
    "Perception Encoder": ("vit_pe_core_tiny_patch16_384", 64, SHALLOW),
    "Hiera": ("hiera_tiny_224", 224, {}),
    "ViTamin": ("vitamin_small_224", 64, {}),
    "PiT": ("pit_ti_224", 64, {}),
    "PVT v2": ("pvt_v2_b0", 64, {}),
    "TinyViT": ("tiny_vit_5m_224", 224, {}),
    "VOLO": ("volo_d1_224", 64, {}),
    "Twins": ("twins_svt_small", 64, {}),
    "CrossViT": ("crossvit_tiny_240", 240, {}),
    "MobileViT": ("mobilevit_xxs", 64, {}),
    "Swin": ("swin_tiny_patch4_window7_224", 224, {}),
    "Swin v2": ("swinv2_tiny_window8_256", 256, {}),
    "SAM": ("samvit_base_patch16_224", 64, SHALLOW),
    "CaiT": ("cait_xxs24_224", 64, SHALLOW),
    "ConViT": ("convit_tiny", 224, {}),
    "XCiT": ("xcit_nano_12_p16_224", 64, SHALLOW),
    "LeViT": ("levit_128s", 224, {}),
    "MViT v2": ("mvitv2_tiny", 64, {}),
    "NesT": ("nest_tiny", 224, {}),
    "CoaT": ("coat_lite_tiny", 64, {}),
    "DaViT": ("davit_tiny", 64, {}),
    "MaxViT": ("maxvit_tiny_rw_224", 224, {}),
}


def train_one_step(name: str, size: int, options: dict[str, Any], attention: str) -> str:
    """Build a timm model as `model=timm` does and train it for one step; return its hosts.

    Raises:
        ValueError: The model does not build.
    """
    torch.manual_seed(0)
    make = partial(find(attention))
    net = timm_classifier(attention=make, num_classes=10, channels=3, image_size=size, name=name, **options)
    optimiser = torch.optim.SGD(net.train().parameters(), lr=1e-3)
    out = net(torch.randn(2, 3, size, size))
    loss = (out[0] if isinstance(out, tuple) else out).square().mean()
    loss.backward()
    optimiser.step()
    if not all(parameter.isfinite().all() for parameter in (loss, *net.parameters())):
        raise RuntimeError(f"{attention} in {name} is not finite after a step")
    hosts = [what.partition(":")[0] for what in mounted(net).values()]
    return ", ".join(f"{hosts.count(host)} {host}" for host in sorted(set(hosts)))


def build_table() -> str:
    """Build the table as Markdown: families that train, then refused ones, with counts."""
    rows, refused = [], []
    for family, (name, size, options) in FAMILIES.items():
        try:
            hosts = {train_one_step(name, size, options, attention) for attention in MECHANISMS}
            rows.append(f"| {family} | `{name}` | {', '.join(sorted(hosts))} |")
        except ValueError:
            refused.append(f"{family} (`{name}`)")
    head = ["| family | tried | mounted |", "| --- | --- | --- |"]
    return "\n".join([*head, *rows, "", f"{len(rows)} of {len(FAMILIES)}; refused: {', '.join(refused)}."])


if __name__ == "__main__":
    torch.set_num_threads(1)
    end_command(lambda: print(build_table()))
