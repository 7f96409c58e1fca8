"""Random changes of training images, against torchvision's."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from thresher.data.augmentation import CentreCrop, CropFlip, PerImage


def photo(channels: int, height: int = 16, width: int = 16) -> Tensor:
    """One image with smooth and rough parts."""
    generator = torch.Generator().manual_seed(3)
    ramp = torch.linspace(20, 180, height)[:, None] + torch.linspace(0, 40, width)
    noise = torch.randint(0, 30, (channels, height, width), generator=generator)
    return (ramp + noise).to(torch.uint8)


def variants(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_crop_flip_yields_all_shifts_and_mirrors_and_nothing_else() -> None:
    image = photo(3)
    padded = v2.functional.pad(image, [2, 2, 2, 2])
    shifts = [padded[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
    expected = variants(torch.stack([turned for shift in shifts for turned in (shift, shift.flip(-1))]))
    torch.manual_seed(0)
    assert variants(CropFlip()(image.expand(1500, -1, -1, -1))) == expected


def test_crop_flip_of_oblong_images() -> None:
    images = photo(1, 8, 24).expand(5, -1, -1, -1)
    assert CropFlip()(images).shape == images.shape


def test_transforms_of_torchvision_draw_for_each_image() -> None:
    image = photo(3)
    torch.manual_seed(0)
    batch = PerImage(v2.RandAugment())(image.expand(50, -1, -1, -1))
    assert batch.dtype == torch.uint8
    assert len(variants(batch)) > 20
    assert len(variants(v2.RandAugment()(image.expand(50, -1, -1, -1)))) == 1, "PerImage would not be needed"


def test_erasing_blanks_one_rectangle_of_the_chosen_images() -> None:
    images = torch.rand(400, 3, 16, 16) + 0.1
    before = images.clone()
    erased = PerImage(v2.RandomErasing(0.25))(images)
    assert torch.equal(images, before), "the images given stay as they were"
    touched = (erased != images).flatten(1).any(1)
    assert 0.15 < touched.float().mean() < 0.35
    for image in erased[touched]:
        rows, columns = (image == 0).all(0).nonzero(as_tuple=True)
        assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("side", [14, 33, 224])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (31, 31), (257, 64), (1, 3), (640, 479)])
def test_the_centre_is_what_is_left_of_the_resized_image(side: int, size: tuple[int, int]) -> None:
    image = noise(*size)
    expected = v2.CenterCrop(side)(v2.Resize(round(side * 8 / 7))(image))
    assert CentreCrop((side, side), 8 / 7)(image).tobytes() == expected.tobytes()


@pytest.mark.parametrize("size", [(1500, 60), (60, 1500), (997, 31)])
def test_the_centre_of_long_images_differs_by_rounding_only(size: tuple[int, int]) -> None:
    image = noise(*size)
    expected = np.asarray(v2.CenterCrop(28)(v2.Resize(32)(image))).astype(int)
    assert np.abs(np.asarray(CentreCrop((28, 28), 8 / 7)(image)) - expected).max() <= 1


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (60_000, 1), (1, 60_000), (1, 1)])
@pytest.mark.parametrize("wanted", [(64, 128), (128, 64), (1, 1), (3, 1)])
def test_the_centre_has_the_size_and_the_proportions(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    cut = CentreCrop(wanted, 8 / 7)(noise(*size))
    assert cut.size == wanted[::-1]
    if size == (300, 200) and wanted == (64, 128):
        scale = round(128 * 8 / 7) / 300
        middle = noise(*size).resize((round(300 * scale), int(200 * scale)), Image.Resampling.BILINEAR)
        assert cut.tobytes() == v2.CenterCrop(wanted)(middle).tobytes()
