"""Read an image file of any format: upright, opaque, RGB with 8 bits a channel.

Of several frames the first is read. The orientation of the file is applied. Transparent pixels are white, not their
hidden colours. 16-bit grey is divided by 257, so that 65,535 is white.
"""

import functools
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

BACKGROUND = "white"
# Formats whose pixels have a range. Other formats of Pillow run programs, hold no pixels or have no range.
KNOWN = (
    *("AVIF", "BMP", "DDS", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI", "TIFF", "WEBP", "TGA"),
)
Image.init()
FORMATS = [name for name in KNOWN if name in Image.OPEN]
READABLE = {*FORMATS, "MPO"}  # read like JPEG
EXTENSIONS = {extension for extension, name in Image.registered_extensions().items() if name in READABLE}


def is_image(name: str) -> bool:
    """Tell by its extension whether a file is an image."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def read_rgb(path: Path) -> Image.Image:
    """Read an image as RGB.

    Raises:
        ValueError: It cannot be read; the message names the file.
    """
    try:
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            with Image.open(path, formats=FORMATS) as image:
                ImageOps.exif_transpose(image, in_place=True)
                rgb = to_rgb(image)
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is not a readable image ({reason}); repair or remove it") from error
    for warning in raised:
        _warn_once(path, str(warning.message))
    return rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, on white where it is transparent.

    Raises:
        ValueError: No number of its mode is defined as white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return _convert_16_bits(image)
    if image.mode[0] in "IF":
        raise ValueError(f"numbers of mode {image.mode} have no range from black to white: convert it to 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, BACKGROUND)
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def _convert_16_bits(image: Image.Image) -> Image.Image:
    deep = np.asarray(image).astype(np.int64)
    grey = (deep + 128) // 257
    if "transparency" in image.info:  # the one transparent value
        grey[deep == image.info["transparency"]] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


@functools.cache
def _warn_once(path: Path, message: str) -> None:
    warnings.warn(f"{path}: {message}", stacklevel=3)
