"""Random changes of a batch of training images, independent for every image.

torchvision's v2 transforms draw once per call, so all images of a batch would change alike. `PerImage` calls a
transform image by image. Crop and flip are written for batches, since image by image they would cost 1.3 s for 9,000
images of 28x28 instead of 0.1 s. (`randaugment` costs 3.5 s that way: use workers.) All random numbers come from
torch's global generator, so they follow the seed of the training run.
"""

from typing import Literal, get_args

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

Augment = Literal["none", "crop_flip", "randaugment"]
AUGMENTS: tuple[str, ...] = get_args(Augment)
LARGEST = 16  # largest ratio of the pixels of a whole image to those of its crop


class CropFlip(nn.Module):
    """Shift every image by up to an eighth of its size, filled with black, and mirror half of them."""

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
        b, _, h, w = images.shape
        pad_h, pad_w = round(h / 8), round(w / 8)
        padded = F.pad(images, (pad_w, pad_w, pad_h, pad_h))
        rows = torch.randint(2 * pad_h + 1, (b, 1)) + torch.arange(h)
        columns = torch.randint(2 * pad_w + 1, (b, 1)) + torch.arange(w)
        columns = torch.where(torch.rand(b, 1) < 0.5, columns.flip(1), columns)
        cropped = padded[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return cropped.movedim(-1, 1).contiguous()


class PerImage(nn.Module):
    """Call a random transform on each image of a batch.

    Args:
        transform: Maps an image to one of the same shape.
    """

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([self.transform(image) for image in images])


class CentreCrop(nn.Module):
    """Resize an image until it covers a size with some room around it, and crop the centre.

    Of a long image only the crop is resized, which changes a pixel by at most one level: resizing a whole image of
    3,000 x 2 pixels would need 1.2 GB.

    Args:
        size: Height and width of the crop.
        room: Height and width to cover, as a multiple of `size`.
    """

    def __init__(self, size: tuple[int, int], room: float) -> None:
        super().__init__()
        self.size = size
        self.covered = (round(size[0] * room), round(size[1] * room))

    def forward(self, image: Image.Image) -> Image.Image:
        (rows, columns), (height, width) = self.size, self.covered
        if height * image.width >= width * image.height:
            width = height * image.width // image.height
        else:
            height = width * image.height // image.width
        top, left = round((height - rows) / 2), round((width - columns) / 2)
        if width * height <= LARGEST * rows * columns:
            whole = image.resize((width, height), Image.Resampling.BILINEAR)
            return whole.crop((left, top, left + columns, top + rows))
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + columns) * across, (top + rows) * down)
        return image.resize((columns, rows), Image.Resampling.BILINEAR, box)
