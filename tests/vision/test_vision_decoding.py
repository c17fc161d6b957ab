"""How image files become pixels: orientation, ranges of wide types, transparency, pipes, and what is refused with which words."""

import io
import os
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from interflow_vision.data import decoding
from interflow_vision.data.images import Preprocessing
from interflow_vision.errors import UserError

RULE = Preprocessing(8, (0.0,), (1.0,))
EIGHT_BIT = np.zeros((8, 8), np.uint8)
EIGHT_BIT[:2], EIGHT_BIT[5:, 3:] = 200, 90
WIDE = EIGHT_BIT.astype(np.int32) * 257  # the same brightness in 16 bits


def expected() -> torch.Tensor:
    return torch.from_numpy(EIGHT_BIT).float()[None] / 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp", "16-bit png", "big-endian tif", "float tif"])
def test_exif_orientation(tmp_path, kind, orientation):
    values = np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40 + 30, np.ones((8, 8), np.uint8))  # 16 x 24: turning it shows
    image = {
        "16-bit png": lambda: Image.fromarray(values.astype(np.uint16) * 257),
        "big-endian tif": lambda: Image.frombytes("I;16B", (24, 16), (values.astype(">u2") * 257).tobytes()),
        "float tif": lambda: Image.fromarray(values.astype(np.float32) / 255),
    }.get(kind, lambda: Image.fromarray(values))()
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind.split()[-1]}"
    options = {"quality": 95} if "jpg" in kind else {"lossless": True} if kind == "webp" else {}
    image.save(path, exif=exif, **options)
    upright = Image.fromarray(values)
    upright.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(upright)
    got = decoding.pixels(decoding.load(path), 1)
    want = torch.from_numpy(np.array(upright)).float()[None] / 255
    assert got.shape == want.shape == ((1, 16, 24) if orientation < 5 else (1, 24, 16))
    torch.testing.assert_close(got, want, rtol=0, atol=0.02 if "jpg" in kind else 1e-6)


def test_images_in_memory_are_turned_too():
    image = Image.fromarray(EIGHT_BIT)
    image.getexif()[0x0112] = 3
    torch.testing.assert_close(RULE(image), expected().flip(1, 2))


@pytest.mark.parametrize("name", ["int32.tif", "float.tif", "be16.tif", "le16.png", "one.png", "palette.png", "rgb.png", "cmyk.tif"])
def test_the_same_picture_in_every_type(tmp_path, name):
    bilevel = Image.fromarray(EIGHT_BIT > 0)
    images = {
        "int32.tif": lambda: Image.fromarray(WIDE),
        "float.tif": lambda: Image.fromarray(EIGHT_BIT.astype(np.float32) / 255),
        "be16.tif": lambda: Image.frombytes("I;16B", (8, 8), WIDE.astype(">u2").tobytes()),
        "le16.png": lambda: Image.fromarray(WIDE.astype(np.uint16)),
        "one.png": lambda: bilevel,
        "palette.png": lambda: Image.fromarray(EIGHT_BIT).convert("P"),
        "rgb.png": lambda: Image.fromarray(EIGHT_BIT).convert("RGB"),
        "cmyk.tif": lambda: Image.fromarray(EIGHT_BIT).convert("RGB").convert("CMYK"),
    }
    images[name]().save(tmp_path / name)
    want = (expected() > 0).float() if name == "one.png" else expected()
    torch.testing.assert_close(RULE.read(tmp_path / name), want, rtol=0, atol=1e-6)
    three = Preprocessing(8, (0.0,) * 3, (1.0,) * 3).read(tmp_path / name)
    torch.testing.assert_close(three, want.expand(3, -1, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "PA", "L", "RGB", "I;16"])
def test_hidden_colours_do_not_count(tmp_path, mode):
    hidden = np.where(EIGHT_BIT > 0, 0, 77).astype(np.uint8)
    picture = Image.fromarray(np.where(EIGHT_BIT > 0, 60, hidden).astype(np.uint8))
    alpha = Image.fromarray(np.where(EIGHT_BIT > 0, 255, 0).astype(np.uint8))
    options = {}
    if mode == "P":
        picture = picture.convert("P")
        options = {"transparency": 77}
    elif mode == "L":
        options = {"transparency": 77}
    elif mode == "RGB":
        picture, options = picture.convert("RGB"), {"transparency": (77, 77, 77)}
    elif mode == "I;16":
        picture, options = Image.fromarray(np.array(picture).astype(np.uint16) * 257), {"transparency": 77 * 257}
    else:
        picture = picture.convert({"RGBA": "RGB", "PA": "P"}.get(mode, "L"))
        picture.putalpha(alpha)
        assert picture.mode == mode
    want = torch.where(expected() > 0, 60 / 255, 1.0)  # on white
    if mode == "PA":
        got = decoding.pixels(picture, 1)
    else:
        picture.save(tmp_path / "a.png", **options)
        got = RULE.read(tmp_path / "a.png")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_half_transparent_is_half_white():
    image = Image.new("RGBA", (4, 4), (0, 100, 200, 128))
    got = decoding.pixels(image, 3)[:, 0, 0] * 255
    torch.testing.assert_close(got, torch.tensor([127.0, 177.0, 227.0]), rtol=0, atol=1)


FLOATS, INTEGERS, BLACK = "floating-point images must have values from 0 to 1", "32-bit images must have values from 0 to 65535", "so it would be black"
REFUSED = {
    "large float": (lambda: Image.fromarray(EIGHT_BIT.astype(np.float32)), f"{FLOATS}, but it has values from 0 to 200"),
    "negative float": (lambda: Image.fromarray(EIGHT_BIT / np.float32(200) - np.float32(0.5)), f"{FLOATS}, but it has values from -0.5 to 0.5"),
    "nan": (lambda: Image.fromarray(np.full((8, 8), np.nan, np.float32)), f"{FLOATS}, but it has values that are not numbers"),
    "large integers": (lambda: Image.fromarray(WIDE * 2), f"{INTEGERS}, but it has values from 0 to 102800"),
    "negative integers": (lambda: Image.fromarray(WIDE - 1), f"{INTEGERS}, but it has values from -1 to 51399"),
    "8 bits in 32": (lambda: Image.fromarray(EIGHT_BIT.astype(np.int32)), f"a 32-bit image whose values end at 200, {BLACK}"),
    "8 bits in 16": (lambda: Image.fromarray(EIGHT_BIT.astype(np.uint16)), f"a 16-bit image whose values end at 200, {BLACK}"),
    "lab": (lambda: Image.new("LAB", (8, 8)), "conversion from LAB to RGB not supported"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_values_out_of_range_are_refused_not_clipped(tmp_path, kind):
    make, message = REFUSED[kind]
    make().save(tmp_path / "a.tif")
    for training in (False, True):
        with pytest.raises(UserError, match=message) as error:
            RULE.read(tmp_path / "a.tif", training)
        assert str(error.value).startswith(f"the image {tmp_path / 'a.tif'} cannot be read: ") and "\n" not in str(error.value)


def test_black_images_of_every_type_are_black():
    for mode in ("I", "F", "I;16", "I;16B"):
        assert torch.equal(decoding.pixels(Image.new(mode, (3, 2)), 1), torch.zeros(1, 2, 3))


def test_the_range_does_not_depend_on_the_part_that_is_cut_out():
    image = Image.fromarray(WIDE)
    torch.testing.assert_close(decoding.pixels(image, 1, (3, 5, 8, 8)), torch.full((1, 3, 5), 90 / 255))
    assert torch.equal(decoding.pixels(image, 1, (0, 2, 3, 4)), torch.zeros(1, 2, 3))


def test_narrow_images_are_cut_before_they_are_resized(tmp_path):
    # resized first, the longer side would have 64 * 500,000 pixels: 2 GB for each channel
    rule = Preprocessing(64, (0.0,) * 3, (1.0,) * 3)
    for size in ((1, 500_000), (500_000, 1)):
        Image.new("L", size, 51).save(tmp_path / "narrow.png")
        assert torch.equal(rule.read(tmp_path / "narrow.png"), torch.full((3, 64, 64), 0.2))
        torch.testing.assert_close(rule.read(tmp_path / "narrow.png", training=True), torch.full((3, 64, 64), 0.2))


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(UserError, match=r"the image .*bomb.png has too many pixels to be read safely: make it smaller \(.*4096 pixels"):
        RULE.read(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # above the limit, below twice the limit: Pillow warns and reads
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RULE.read(tmp_path / "bomb.png").shape == (1, 8, 8)


def test_a_pipe_is_read(tmp_path):
    Image.fromarray(EIGHT_BIT).save(tmp_path / "a.png")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes((tmp_path / "a.png").read_bytes()), daemon=True)
    writer.start()
    torch.testing.assert_close(RULE.read(pipe), expected())
    writer.join(10)


class Stdin:
    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


def test_standard_input_is_read(tmp_path, monkeypatch):
    Image.fromarray(EIGHT_BIT).save(tmp_path / "a.png")
    monkeypatch.setattr(sys, "stdin", Stdin((tmp_path / "a.png").read_bytes()))
    torch.testing.assert_close(RULE.read("-"), expected())
    with pytest.raises(UserError, match="nothing came from -, so there is no image to read"):
        RULE.read("-")
    monkeypatch.setattr(decoding, "PIPE_LIMIT", 1 << 20)
    monkeypatch.setattr(sys, "stdin", Stdin(bytes((1 << 20) + 1)))
    with pytest.raises(UserError, match="more than 1 MiB came from -"):
        RULE.read("-")


def test_devices_are_refused():
    with pytest.raises(UserError, match="/dev/zero is neither a file nor a pipe"):
        RULE.read("/dev/zero")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp", "gif"])
def test_damaged_files_give_a_sentence_or_a_picture(tmp_path, suffix):
    """No exception but UserError, however a file is damaged."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(tmp_path / f"good.{suffix}")
    content = (tmp_path / f"good.{suffix}").read_bytes()
    refused = 0
    for i in range(40):
        damaged = bytearray(content)
        if i % 2:
            damaged = damaged[: int(rng.integers(0, len(content)))]
        else:
            for at in rng.integers(0, min(len(content), 200), 6):
                damaged[at] = rng.integers(256)
        (tmp_path / f"bad.{suffix}").write_bytes(damaged)
        said = ""
        try:
            x = RULE.read(tmp_path / f"bad.{suffix}")
        except UserError as error:
            said = str(error)
        assert x.shape == (1, 8, 8) if not said else f"bad.{suffix}" in said and "\n" not in said
        refused += bool(said)
    assert refused >= 10
