"""Random changes of training images, against torchvision's."""

import torch
from torch import Tensor
from torchvision.transforms import v2

from thresher.data.augmentation import CropFlip, PerImage


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
