"""The data sets: splits, preprocessing, augmentation, and what a user hears when something is missing."""

import sys

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from interflow_vision.data import DIGITS_MEAN, DIGITS_SPLIT, DIGITS_STD, Digits, ImageFolder, digits_split
from interflow_vision.errors import MissingPackageError, UserError
from interflow_vision.images import Preprocessing, random_affine

TARGET = torch.from_numpy(load_digits().target)
GREY = Preprocessing(16, (0.5,), (0.25,))


def test_split_is_disjoint_complete_and_deterministic():
    parts = digits_split(TARGET, 0)
    assert tuple(map(len, parts)) == DIGITS_SPLIT == (1077, 360, 360)
    assert sorted(torch.cat(parts).tolist()) == list(range(1797))
    assert all(torch.equal(a, b) for a, b in zip(parts, digits_split(TARGET, 0), strict=True))
    assert not torch.equal(parts[0], digits_split(TARGET, 1)[0])


@pytest.mark.parametrize("seed", range(5))
def test_split_has_every_class_in_proportion(seed):
    whole = torch.bincount(TARGET) / len(TARGET)
    for part in digits_split(TARGET, seed):
        assert (torch.bincount(TARGET[part]) - whole * len(part)).abs().max() < 3


def test_split_does_not_depend_on_the_training_seed():
    torch.manual_seed(5)
    first = digits_split(TARGET, 0)
    torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(first, digits_split(TARGET, 0), strict=True))


def test_digits_are_normalised_rgb_images_of_the_asked_size():
    data = Digits(size=32, batch_size=50)
    data.setup("fit")
    x, target = next(iter(data.val_dataloader()))
    assert (x.shape, x.dtype, target.dtype) == ((50, 3, 32, 32), torch.float32, torch.int64)
    assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])
    assert [len(loader.dataset) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())] == list(DIGITS_SPLIT)
    raw = torch.from_numpy(load_digits().images)[digits_split(TARGET, 0)[0]] / 16
    assert (raw.mean().item(), raw.std().item()) == pytest.approx((DIGITS_MEAN, DIGITS_STD), abs=1e-4)


def test_loaders_keep_the_order_except_for_training():
    data = Digits(size=16)
    data.setup()
    labels = lambda loader: torch.cat([target for _, target in loader])  # noqa: E731
    assert torch.equal(labels(data.test_dataloader()), data.parts[2].tensors[1])
    torch.manual_seed(0)
    assert not torch.equal(labels(data.train_dataloader())[:64], data.parts[0].tensors[1][:64])


def test_a_batch_larger_than_the_data_is_not_dropped():
    data = Digits(size=16, batch_size=5000)
    data.setup()
    assert len(data.train_dataloader()) == 1


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"size": 0}])
def test_bad_digits_options(options):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        Digits(**options)


def test_augmentation_is_for_training_only():
    data = Digits(size=16)
    batch = (torch.rand(4, 3, 16, 16), torch.arange(4))

    class Trainer:
        training = False

    data.trainer = Trainer()
    assert data.on_after_batch_transfer(batch, 0)[0] is batch[0]
    data.trainer.training = True
    torch.manual_seed(0)
    x, target = data.on_after_batch_transfer(batch, 0)
    assert x.shape == batch[0].shape and not torch.allclose(x, batch[0]) and torch.equal(target, batch[1])


def test_random_affine_without_motion_changes_nothing():
    x = torch.rand(3, 2, 9, 12)
    torch.testing.assert_close(random_affine(x, 0, 0, 0), x, rtol=1e-4, atol=1e-5)


def test_random_affine_shifts_by_pixels():
    torch.manual_seed(0)
    x = torch.zeros(200, 1, 31, 31)
    x[:, :, 15, 15] = 1
    moved = random_affine(x, 3, 0, 0)[:, 0]
    at = torch.arange(31.0)
    offsets = torch.stack([(moved.sum(2) * at).sum(1), (moved.sum(1) * at).sum(1)]) / moved.sum((1, 2)) - 15
    assert 2.8 < offsets.abs().max() <= 3.01
    assert offsets.mean().abs() < 0.3
    assert offsets.std() == pytest.approx(3 / 3**0.5, rel=0.15)  # uniform


def test_random_affine_turns_each_image_by_its_own_angle():
    torch.manual_seed(0)
    x = torch.rand(1, 1, 16, 16).expand(2, -1, -1, -1)
    a, b = random_affine(x, 0, 30, 0)
    assert not torch.allclose(a, b)
    # a disc in the middle stays where it is
    distance = (torch.arange(16.0) - 7.5).square()
    disc = torch.exp(-(distance[:, None] + distance) / 8)[None, None]
    torch.testing.assert_close(random_affine(disc, 0, 30, 0), disc, rtol=0, atol=0.05)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_preprocessing_takes_every_mode(mode):
    for rule, channels in ((GREY, 1), (Preprocessing(16, (0.5,) * 3, (0.5,) * 3), 3)):
        assert rule(Image.new(mode, (20, 30))).shape == (channels, 16, 16)


def test_sixteen_bit_images_are_scaled_not_clipped():
    half = Image.new("I;16", (16, 16), 32768)
    assert GREY(half).mean().item() == pytest.approx((128 / 255 - 0.5) / 0.25, abs=0.02)


def test_preprocessing_scales_the_shorter_side_and_cuts_the_centre():
    image = Image.new("L", (48, 16), 0)
    image.paste(255, (16, 0, 32, 16))
    assert torch.equal(GREY(image), torch.full((1, 16, 16), 2.0))
    large = GREY(image.resize((480, 160), Image.Resampling.NEAREST))
    torch.testing.assert_close(large[:, :, 1:-1], torch.full((1, 16, 14), 2.0))  # the borders blend with what lies beyond
    assert (large[:, :, 0] < 2).all() and (large[:, :, 0] > 1).all()


def test_files_give_what_the_data_set_gives(digit_files):
    data = Digits(size=32)
    rows = torch.from_numpy(load_digits().images[:10]).float()[:, None] / 16
    expected = data.preprocessing.normalize(data.preprocessing.fit(rows).expand(-1, 3, -1, -1))
    got = torch.stack([data.preprocessing.read(file) for file in digit_files])
    torch.testing.assert_close(got, expected, rtol=0, atol=0.5 / 255 / DIGITS_STD + 1e-5)  # 8-bit rounding


def test_preprocessing_is_kept_as_numbers():
    rule = Preprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert Preprocessing.from_dict(rule.as_dict()) == rule


def test_unreadable_images(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    Image.new("L", (64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    for name, message in (("none.png", "there is no image"), ("text.png", "is not an image"), ("cut.png", "cut.png"), (".", "cannot be read")):
        with pytest.raises(UserError, match=message):
            GREY.read(tmp_path / name)


def test_image_folder_missing_folder(tmp_path):
    with pytest.raises(UserError, match=f"there is no folder {tmp_path}/none; the data set must have train/<class>/ and val/<class>/"):
        ImageFolder(str(tmp_path / "none")).prepare_data()
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=f"there is no folder {tmp_path}/val"):
        ImageFolder(str(tmp_path)).prepare_data()


def test_image_folder_without_torchvision(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingPackageError, match=r'a folder of images as data set needs torchvision.*pip install "interflow-kernels\[vision\]"'):
        ImageFolder(str(tmp_path)).prepare_data()


def test_image_folder(tmp_path):
    pytest.importorskip("torchvision", reason="torchvision (extra [vision]) is not installed", exc_type=ImportError)
    for part in ("train", "val"):
        for label in ("ant", "bee"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (40, 30), (80 * i, 0, 0)).save(tmp_path / part / label / f"{i}.png")
    data = ImageFolder(str(tmp_path), batch_size=2, size=24, num_workers=0)
    data.setup("fit")
    assert data.class_names == ("ant", "bee")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        x, target = next(iter(loader))
        assert x.shape == (2, 3, 24, 24) and target.shape == (2,)
    (tmp_path / "val" / "cow").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "cow" / "0.png")
    with pytest.raises(UserError, match=r"has other classes than .*: cow"):
        ImageFolder(str(tmp_path)).setup()
