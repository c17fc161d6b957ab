"""Folders of images: which files count, how classes are numbered, and what is said of a folder that has none."""

import os

import pytest
import torch
from PIL import Image

from interflow_vision.data.folders import ClassFolders, images_below
from interflow_vision.errors import UserError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(root / name, format="png")


NAMES = (
    "zebra/1.png",
    "Ant/b.JPG",
    "Ant/a.png",
    "bee/x/2.tiff",
    "bee/x-y/1.webp",
    "bee/x/1.ppm",
    "bee/x/s/3.png",
    "bee/10.png",
    "bee/9.png",
    "10/a.bmp",
    "9/a.pgm",
)
ORDER = [
    *("10/a.bmp", "9/a.pgm", "Ant/a.png", "Ant/b.JPG"),
    *("bee/10.png", "bee/9.png", "bee/x/1.ppm", "bee/x/2.tiff", "bee/x-y/1.webp", "bee/x/s/3.png", "zebra/1.png"),
]


def listed(root):
    part = ClassFolders(root, read=lambda path: torch.zeros(1))
    return part, [str(path.relative_to(root)) for path, _ in map(part.sample, range(len(part)))]


def test_classes_are_numbered_by_name_and_files_in_order(tmp_path):
    touch(tmp_path, *NAMES)
    part, names = listed(tmp_path)
    assert part.classes == ["10", "9", "Ant", "bee", "zebra"]
    assert names == ORDER
    assert [number for _, number in [part.sample(i) for i in range(len(part))]] == [0, 1, 2, 2, 3, 3, 3, 3, 3, 3, 4]
    assert len(part) == 11 and part[4][1] == 3


def test_order_is_torchvisions(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision (extra [vision]) is not installed", exc_type=ImportError)
    touch(tmp_path, *NAMES)
    part, names = listed(tmp_path)
    theirs = datasets.ImageFolder(str(tmp_path))
    assert theirs.classes == part.classes
    assert [(os.path.relpath(path, tmp_path), number) for path, number in theirs.samples] == list(
        zip(names, (n for _, n in [part.sample(i) for i in range(len(part))]), strict=True)
    )


def test_hidden_and_other_files_do_not_count(tmp_path):
    touch(tmp_path, *NAMES, ".git/a.png", "bee/.thumbs/a.png", "bee/.a.png", "Ant/._a.png", "loose.png", "bee/notes.txt")
    os.mkfifo(tmp_path / "bee" / "pipe.png")
    assert listed(tmp_path)[1] == ORDER


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path, "data/bee/1.png", "elsewhere/2.png")
    (tmp_path / "data" / "bee" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "bee" / "up").symlink_to(tmp_path / "data")
    assert listed(tmp_path / "data")[1] == ["bee/1.png", "bee/more/2.png"]
    (tmp_path / "data" / "bee" / "gone.png").symlink_to(tmp_path / "nowhere.png")  # said when it is read
    assert "bee/gone.png" in listed(tmp_path / "data")[1]


def test_a_class_without_images_is_named(tmp_path):
    touch(tmp_path, "ant/1.png", "bee/.1.png", "bee/notes.txt")
    with pytest.raises(UserError, match=rf"the class folder {tmp_path}/bee has no images \(.jpg, .*\): fill it or remove it"):
        listed(tmp_path)


def test_a_folder_without_class_folders(tmp_path):
    touch(tmp_path, "1.png", ".hidden/2.png")
    with pytest.raises(UserError, match=f"{tmp_path} has no class folders: it must hold a folder for each class"):
        listed(tmp_path)


def test_a_folder_that_cannot_be_listed(tmp_path):
    with pytest.raises(UserError, match=f"the folder {tmp_path}/none cannot be listed: No such file"):
        images_below(tmp_path / "none")
