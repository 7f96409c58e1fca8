"""Which files are images of which class and part, whatever links lead to them."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from thresher.data import image_listing
from thresher.data.image_folder import ImageFolder
from thresher.data.image_listing import ALREADY

Write = Callable[[dict[str, int]], Path]
FLAT = {"cat": 12, "dog": 8}
PARTS = {"train/cat": 6, "train/dog": 4, "val/cat": 2, "val/dog": 1, "test/cat": 1, "test/dog": 2}


def ready(root: Path) -> ImageFolder:
    data = ImageFolder(root=root, image_size=8, batch_size=2)
    data.setup("fit")
    data.setup("test")
    return data


def read(data: ImageFolder) -> list[Path]:
    """Return the files of all parts."""
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    return [loader.dataset.source.paths[i] for loader in loaders for i in loader.dataset.indices]


def left_out(data: ImageFolder) -> Counter[str]:
    return sum((Counter(part.left_out) for part in data.summary()), Counter())


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), "red").save(path, format="png")
    return path


class Numberless:
    """An entry of a folder on a mount that lists one number for all files."""

    def __init__(self, entry: os.DirEntry[str]) -> None:
        self.entry = entry

    def inode(self) -> int:
        return 0xFFFFFFFF

    def __getattr__(self, name: str) -> object:
        return getattr(self.entry, name)


@pytest.mark.parametrize("layout", [FLAT, PARTS])
@pytest.mark.parametrize("every", [1, 2])
def test_files_are_told_apart_where_folders_list_no_numbers(
    write_tree: Write, monkeypatch: pytest.MonkeyPatch, layout: dict[str, int], every: int
) -> None:
    root = write_tree(layout)
    images = set(root.rglob("*.png"))
    inside = root / next(iter(layout))
    first = min(inside.glob("*.png"))
    os.symlink(first, inside / "link.png")
    os.link(max(inside.glob("*0.png")), inside / "~hard.png")
    listed = image_listing.list_entries

    def entries(folder: Path) -> list[object]:
        return [Numberless(each) if i % every == every - 1 else each for i, each in enumerate(listed(folder))]

    monkeypatch.setattr(image_listing, "list_entries", entries)
    data = ready(root)
    assert set(read(data)) == images
    assert len(read(data)) == len(images)
    assert left_out(data)[ALREADY] == 2


@pytest.mark.parametrize("layout", [FLAT, PARTS])
def test_what_is_not_read_is_counted_by_reason(write_tree: Write, layout: dict[str, int]) -> None:
    root = write_tree(layout)
    images = set(root.rglob("*.png"))
    inside = root / next(iter(layout))
    put(inside / ".ipynb_checkpoints" / "x.png")
    put(inside / ".hidden.png")
    put(inside / "._x.png")
    put(inside.parent / ".cache" / "x.png")
    for name in ("notes.txt", "README", "photo.HEIC", "other.heic", "clip.mp4"):
        (inside / name).write_text("no image")
    (inside.parent / "list.csv").write_text("no image")
    os.mkfifo(inside / "pipe.png")
    data = ready(root)
    assert set(read(data)) == images
    assert len(read(data)) == len(images)
    assert data.class_names == ["cat", "dog"]
    assert left_out(data) == {
        "hidden folders": 2,
        "hidden files": 2,
        "files ending in .txt": 1,
        "files ending in .heic": 2,
        "files ending in .mp4": 1,
        "files without an extension": 1,
        "files beside the folders of classes": 1,
        "things that are neither file nor folder": 1,
    }


def test_every_format_that_is_read_is_listed_and_a_folder_may_be_called_like_one(write_tree: Write) -> None:
    root = write_tree(FLAT)
    more = [put(root / "cat" / name) for name in ("a.gif", "b.JFIF", "c.avif", "d.tga", "album.jpg/e.webp")]
    data = ready(root)
    assert set(more) < set(read(data))
    assert left_out(data) == {}


LINKS: dict[str, tuple[str, str]] = {
    "to itself": ("cat/again", "."),
    "to the class": ("cat/again", "../cat"),
    "to the root, in a class": ("cat/again", ".."),
    "to the root, as a class": ("again", "."),
    "above the root": ("dog/again", "../../.."),
    "to another class": ("cat/again", "../dog"),
    "to a folder of another class": ("cat/again", "../dog/deep"),
    "to a file of the class": ("cat/again.png", "000.png"),
    "to a file of another class": ("cat/again.png", "../dog/000.png"),
}


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("layout", ["flat", "parts"])
def test_links_multiply_nothing(write_tree: Write, layout: str, link: tuple[str, str]) -> None:
    root = write_tree(FLAT if layout == "flat" else PARTS)
    base = root if layout == "flat" else root / "train"
    put(base / "dog" / "deep" / "x.png")
    images = set(root.rglob("*.png"))
    (base / link[0]).symlink_to(link[1])
    data = ready(root)
    assert sorted(read(data)) == sorted(images)
    assert data.class_names == ["cat", "dog"]
    assert left_out(data) == {ALREADY: 1}


def test_links_that_form_a_ring_end(write_tree: Write, tmp_path: Path) -> None:
    root = write_tree(FLAT)
    for name, other in (("one", "two"), ("two", "one")):
        put(tmp_path / name / "x.png")
        (tmp_path / name / "on").symlink_to(tmp_path / other)
    (root / "cat" / "far").symlink_to(tmp_path / "one")
    (root / "dog" / "loop").symlink_to("loop")
    (root / "loop").symlink_to("loop")
    data = ready(root)
    assert len(read(data)) == 22
    assert left_out(data) == {
        ALREADY: 1,
        "links that lead nowhere": 1,
        "files beside the folders of classes": 1,
    }


def test_links_to_what_lies_elsewhere_are_followed_once(write_tree: Write, tmp_path: Path) -> None:
    root = write_tree(PARTS)
    pool = tmp_path / "pool"
    for name in ("a.png", "b.png", "deep/c.png"):
        put(pool / name)
    (root / "train" / "eel").symlink_to(pool)
    for part in ("val", "test"):
        put(root / part / "eel" / "x.png")
    put(tmp_path / "single.png")
    (root / "train" / "cat" / "single.png").symlink_to(tmp_path / "single.png")
    (root / "train" / "cat" / "twice.png").symlink_to(tmp_path / "single.png")
    data = ready(root)
    assert data.summary()[0].classes == {"cat": 7, "dog": 4, "eel": 3}
    assert left_out(data) == {ALREADY: 1}


def test_a_part_may_be_a_link(write_tree: Write, tmp_path: Path) -> None:
    root = write_tree(PARTS)
    (root / "test").rename(tmp_path / "elsewhere")
    (root / "test").symlink_to(tmp_path / "elsewhere")
    assert ready(root).summary()[2].classes == {"cat": 1, "dog": 2}


def test_hard_links_in_a_class_are_one_image(write_tree: Write) -> None:
    root = write_tree(FLAT)
    os.link(root / "cat" / "000.png", root / "cat" / "again.png")
    data = ready(root)
    assert len(read(data)) == 20
    assert left_out(data) == {ALREADY: 1}


@pytest.mark.parametrize("make", [os.link, os.symlink], ids=["hard", "symbolic"])
@pytest.mark.parametrize("part", ["val", "test"])
def test_a_file_in_two_parts_is_refused(write_tree: Write, part: str, make: Callable[..., None]) -> None:
    root = write_tree(PARTS)
    make(root / "train" / "cat" / "000.png", root / part / "cat" / "again.png")
    with pytest.raises(ValueError, match=rf"{part}/cat/again.png and .*train/cat/000.png are one file in two parts"):
        ready(root)


@pytest.mark.parametrize(("name", "target"), [("test", "val"), ("val", "train"), ("test", "train")])
def test_a_part_that_is_a_link_to_another_is_refused(write_tree: Write, name: str, target: str) -> None:
    root = write_tree({key: count for key, count in PARTS.items() if not key.startswith(name)})
    (root / name).symlink_to(target)
    with pytest.raises(ValueError, match=f"{name}/cat/000.png and .*/{target}/cat/000.png are one file in two parts"):
        ready(root)


def test_a_file_in_two_classes_is_refused(write_tree: Write, tmp_path: Path) -> None:
    root = write_tree(FLAT)
    (root / "kitty").symlink_to("cat")
    with pytest.raises(ValueError, match=r"kitty/0.*png and .*/cat/0.*png are one file in two classes"):
        ready(root)
    (root / "kitty").unlink()
    put(tmp_path / "single.png")
    for name in ("cat", "dog"):
        (root / name / "single.png").symlink_to(tmp_path / "single.png")
    with pytest.raises(ValueError, match=r"dog/single.png and .*cat/single.png are one file in two classes"):
        ready(root)


def test_an_image_that_is_a_link_to_nowhere_is_refused(write_tree: Write) -> None:
    root = write_tree(FLAT)
    (root / "cat" / "lost.png").symlink_to("not/there.png")
    with pytest.raises(ValueError, match=r"cat/lost.png is a link to not/there.png, which cannot be reached"):
        ready(root)


def test_a_class_without_images_says_what_it_holds(write_tree: Write) -> None:
    root = write_tree({"cat": 3, "dog": 0})
    (root / "dog" / "x.heic").write_text("no image")
    with pytest.raises(ValueError, match=r"dog holds no image that can be read; left out: 1 files ending in .heic"):
        ready(root)


def test_the_order_is_that_of_the_names(write_tree: Write) -> None:
    root = write_tree(PARTS)
    for name in ("Z.png", "a.png", "deep/0.png", "deep-1.png"):
        put(root / "train" / "cat" / name)
    data = ready(root)
    cats = [path for path in data.train_dataloader().dataset.source.paths if path.parts[-2] != "dog"]
    assert cats[:10] == sorted((root / "train" / "cat").rglob("*.png"))
