"""Images of every format and mode that files hold, and of every kind of damage."""

import io
import os
import random
import re
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from thresher.data.image_reading import EXTENSIONS, FORMATS, is_image, read_rgb

LOSSLESS = {".bmp", ".dds", ".ico", ".pcx", ".png", ".apng", ".ppm", ".qoi", ".rgb", ".tga", ".tif", ".tiff"}
RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.fixture(scope="module")
def smooth() -> Image.Image:
    """A picture that compression hardly changes."""
    rows, columns = np.mgrid[:16, :24]
    return Image.fromarray(np.stack([rows * 12, columns * 8, 128 + 0 * rows], -1).astype(np.uint8))


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def pixel(path: Path, place: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = read_rgb(path)
    assert image.mode == "RGB"
    value = image.getpixel(place)
    assert isinstance(value, tuple)
    return value


@pytest.mark.parametrize("extension", sorted(EXTENSIONS - {".pfm", ".pgm", ".pbm", ".bw", ".mpo"}))
def test_every_format_is_read(extension: str, smooth: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / f"x{extension.upper()}"
    kind = Image.registered_extensions()[extension]
    options = {"ICO": {"sizes": [smooth.size]}, "JPEG": {"quality": 95}, "WEBP": {"quality": 95}}
    smooth.save(path, format=kind, **options.get(kind, {}))
    assert is_image(path.name)
    read = np.asarray(read_rgb(path)).astype(int)
    if kind == "GIF":  # has 256 colours
        assert np.abs(read - np.asarray(smooth)).mean() < 10
    elif extension in LOSSLESS:
        assert (read == np.asarray(smooth)).all()
    else:
        assert np.abs(read - np.asarray(smooth)).mean() < 4


def test_formats_that_run_programs_or_hold_no_pixels_are_not_opened(tmp_path: Path) -> None:
    assert not {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR"} & set(FORMATS)
    assert not any(is_image(name) for name in ("x.eps", "x.pdf", "x.svg", "x.txt", "x", "x.heic"))
    path = saved(Image.new("RGB", (4, 4)), tmp_path / "x.eps").rename(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png is not a readable image"):
        read_rgb(path)


@pytest.mark.parametrize("extension", [".gif", ".apng", ".webp", ".tiff", ".avif"])
def test_the_first_of_several_frames_is_read(extension: str, tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    kind = Image.registered_extensions()[extension]
    path = saved(first, tmp_path / f"x{extension}", format=kind, save_all=True, append_images=[second])
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 2
    assert np.abs(np.subtract(pixel(path), RED)).max() < 8


@pytest.mark.parametrize("extension", [".jpg", ".png", ".webp", ".tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_done(extension: str, orientation: int, tmp_path: Path) -> None:
    """A picture with one bright corner, stored so that its orientation brings the corner to the top left."""
    upright = Image.new("RGB", (32, 16), "black")
    upright.paste((255, 255, 255), (0, 0, 16, 8))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = read_rgb(saved(stored, tmp_path / f"x{extension}", exif=exif))
    assert read.size == (32, 16)
    assert np.abs(np.asarray(read).astype(int) - np.asarray(upright)).mean() < 8


def transparent(mode: str) -> tuple[Image.Image, dict[str, object]]:
    """Return an image of 2 x 1 pixels, red (or black) and transparent with a hidden colour, and how to save it."""
    if mode in ("RGBA", "LA"):
        image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
        image.putpixel((1, 0), (0, 200, 0, 0))
        return image.convert(mode), {}
    if mode == "P, one colour":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([255, 0, 0, 0, 200, 0])
        image.putpixel((1, 0), 1)
        return image, {"transparency": 1}
    if mode == "P, alpha":
        image, _ = transparent("P, one colour")
        return image, {"transparency": bytes([255, 0])}
    image = Image.new("RGB", (2, 1), RED).convert(mode.partition(",")[0])
    hidden: int | tuple[int, int, int] = (0, 200, 0) if image.mode == "RGB" else 255 if image.mode == "1" else 200
    image.putpixel((0, 0), RED if image.mode == "RGB" else 0)
    image.putpixel((1, 0), hidden)
    return image, {"transparency": 1 if image.mode == "1" else hidden}


@pytest.mark.parametrize(
    "mode", ["RGBA", "LA", "P, one colour", "P, alpha", "RGB, one colour", "L, one colour", "1, one colour"]
)
def test_hidden_colours_are_not_shown(mode: str, tmp_path: Path) -> None:
    image, options = transparent(mode)
    path = saved(image, tmp_path / "x.png", **options)
    assert pixel(path, (1, 0)) == WHITE
    shown = pixel(path)
    assert shown == (RED if mode[0] in "RP" else shown) != WHITE


@pytest.mark.parametrize("extension", [".gif", ".webp", ".tiff", ".tga", ".ico"])
def test_hidden_colours_of_other_formats_are_not_shown(extension: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    image.paste((0, 200, 0, 0), (8, 0, 16, 16))
    options = {"lossless": True, "exact": True} if extension == ".webp" else {}
    path = saved(image, tmp_path / f"x{extension}", **options)
    assert pixel(path) == RED
    assert pixel(path, (15, 0)) == WHITE


def test_what_is_half_transparent_is_half_white(tmp_path: Path) -> None:
    assert pixel(saved(Image.new("RGBA", (1, 1), (255, 0, 0, 128)), tmp_path / "x.png")) == (255, 127, 127)


@pytest.mark.parametrize("extension", [".png", ".tiff", ".pgm", ".jp2"])
def test_grey_of_sixteen_bits_keeps_its_range(extension: str, tmp_path: Path) -> None:
    deep = np.array([[0, 257, 32_896, 65_535] * 16] * 16, dtype=np.uint16)
    path = saved(Image.fromarray(deep), tmp_path / f"x{extension}")
    assert [pixel(path, (x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]


def test_one_value_of_sixteen_bits_may_be_transparent(tmp_path: Path) -> None:
    path = saved(Image.fromarray(np.array([[1_000, 2_570]], dtype=np.uint16)), tmp_path / "x.png")
    content = path.read_bytes()
    at = content.index(b"IDAT") - 4
    chunks = io.BytesIO()
    PngImagePlugin.putchunk(chunks, b"tRNS", struct.pack(">H", 1_000))
    path.write_bytes(content[:at] + chunks.getvalue() + content[at:])
    assert [pixel(path), pixel(path, (1, 0))] == [WHITE, (10, 10, 10)]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_range_are_refused(dtype: type, tmp_path: Path) -> None:
    path = saved(Image.fromarray(np.ones((3, 3), dtype=dtype)), tmp_path / "x.tiff")
    with pytest.raises(ValueError, match=r"x\.tiff .* have no range from black to white: convert it to 8 or 16 bits"):
        read_rgb(path)


def test_inks_become_colours(tmp_path: Path) -> None:
    for name in ("x.jpg", "x.tiff"):
        path = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / name)
        assert np.abs(np.subtract(pixel(path), RED)).max() < 3


def damaged(path: Path, smooth: Image.Image, kind: str) -> None:
    """Write a file that is no image, or one no more."""
    whole = saved(smooth, path.with_name("whole.png")).read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "bomb":
        content = saved(smooth, path.with_name("whole.bmp")).read_bytes()
        path.write_bytes(content[:18] + struct.pack("<ii", 20_000, 20_000) + content[26:])
    elif kind == "palette":
        content = bytearray(saved(smooth.quantize(16), path.with_name("p.png")).read_bytes())
        at = content.index(b"PLTE")
        del content[at - 4 : at + 4 + 48 + 4]
        path.write_bytes(content)
    else:
        path.write_bytes(
            {
                "empty": b"",
                "zeros": bytes(500),
                "text": b"no image at all\n" * 20,
                "page": b"<!doctype html><html><body>404</body></html>",
                "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
                "header": whole[:12],
                "half": whole[: len(whole) // 2],
                "checksum": whole[:20] + b"\xff" + whole[21:],
                "signature": b"\x89PNG\r\n\x1a\n" + b"x" * 50,
                "vector": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
            }[kind]
        )


@pytest.mark.parametrize(
    "kind",
    [
        *("folder", "bomb", "palette", "empty", "zeros", "text", "page"),
        *("pointer", "header", "half", "checksum", "signature", "vector"),
    ],
)
def test_damage_is_named(kind: str, smooth: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    damaged(path, smooth, kind)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(path))} is not a readable image \(.+\); repair or remove it$"
    ):
        read_rgb(path)


def test_a_file_that_is_gone_or_may_not_be_read_is_named(smooth: Image.Image, tmp_path: Path) -> None:
    path = saved(smooth, tmp_path / "x.png")
    with unreadable(path), pytest.raises(ValueError, match=rf"{path} is not a readable image \(.*Permission denied"):
        read_rgb(path)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path} is not a readable image \(.*No such file"):
        read_rgb(path)


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Take a file's permissions away, and those of the superuser, to whom they mean nothing."""
    user, mode = os.geteuid(), stat.S_IMODE(path.stat().st_mode)
    path.chmod(0)
    if user == 0:
        os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(mode)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000", "DDS", "SGI"])
def test_cut_files_are_named_and_changed_ones_are_read_or_named(kind: str, smooth: Image.Image, tmp_path: Path) -> None:
    whole, rng, path = io.BytesIO(), random.Random(0), tmp_path / "x.png"
    smooth.save(whole, format=kind)
    content = whole.getvalue()
    path.write_bytes(content)
    expected = read_rgb(path).tobytes()

    def read(changed: bytes) -> bytes | None:
        path.write_bytes(changed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return read_rgb(path).tobytes()
        except ValueError as error:
            return None if str(error).startswith(f"{path} is not a readable image") else b"an error without a name"

    for _ in range(25):
        assert read(content[: rng.randrange(len(content))]) in (None, expected)
        flipped = bytearray(content)
        for _ in range(4):
            flipped[rng.randrange(len(flipped))] = rng.randrange(256)
        assert read(bytes(flipped)) != b"an error without a name"


def test_what_pillow_warns_of_is_told_once_with_the_name(
    smooth: Image.Image, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0e\x01\x02\0\xff\0\0\0\xf0\xf0\0\0\0\0\0\0"
    path = saved(smooth, tmp_path / "x.jpg", exif=exif)
    for _ in range(2):
        assert read_rgb(path).size == smooth.size
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == 1
    assert told[0].startswith(f"{path}: ")


@pytest.mark.parametrize("extension", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("exif", [b"garbage!!", b"II", b"", b"II*\0\x08\0\0\0\xff\xff"])
@pytest.mark.filterwarnings("ignore:.*Corrupt EXIF data")
def test_damaged_metadata_are_named_or_turn_nothing(extension: str, exif: bytes, tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (8, 6), "red"), tmp_path / f"x{extension}", exif=b"Exif\0\0" + exif)
    try:
        size: object = read_rgb(path).size
    except ValueError as error:
        size = str(error)
    assert size == (8, 6) or str(size).startswith(f"{path} is not a readable image (not a TIFF file")
