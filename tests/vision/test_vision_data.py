"""The data sets: splits, preprocessing, augmentation, and what a user hears when something is missing."""

import sys

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from interflow_vision.data.images import Preprocessing, random_affine, random_box
from interflow_vision.data.modules import DIGITS_MEAN, DIGITS_SPLIT, DIGITS_STD, Digits, ImageFolder, digits_split
from interflow_vision.errors import UserError

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


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "RGBa", "La", "PA", "CMYK", "HSV", "YCbCr", "I;16", "I;16B", "I", "F"])
def test_preprocessing_takes_every_mode(mode):
    for rule, channels in ((GREY, 1), (Preprocessing(16, (0.5,) * 3, (0.5,) * 3), 3)):
        x = rule(Image.new(mode, (20, 30)))
        assert x.shape == (channels, 16, 16) and x.isfinite().all()


def test_sixteen_bit_images_are_scaled_not_clipped():
    half = Image.new("I;16", (16, 16), 32768)
    assert GREY(half).mean().item() == pytest.approx((32768 / 65535 - 0.5) / 0.25, abs=1e-6)


def test_preprocessing_scales_the_shorter_side_and_cuts_the_centre():
    image = Image.new("L", (48, 16), 0)
    image.paste(255, (16, 0, 32, 16))
    assert torch.equal(GREY(image), torch.full((1, 16, 16), 2.0))
    # cut out before it is resized: what lies beyond the square does not count
    torch.testing.assert_close(GREY(image.resize((480, 160), Image.Resampling.NEAREST)), torch.full((1, 16, 16), 2.0))


def test_files_give_what_the_data_set_gives(digit_files):
    data = Digits(size=32)
    rows = torch.from_numpy(load_digits().images[:10]).float()[:, None] / 16
    expected = data.preprocessing.normalize(data.preprocessing.fit(rows).expand(-1, 3, -1, -1))
    got = torch.stack([data.preprocessing.read(file) for file in digit_files])
    torch.testing.assert_close(got, expected, rtol=0, atol=0.5 / 255 / DIGITS_STD + 1e-5)  # 8-bit rounding


@pytest.mark.parametrize("broken", [None, 3, {}, {"size": 8, "mean": [0.5]}, {"size": 8, "mean": [0.5], "std": [0]}, {"size": "x", "mean": [0.5], "std": [1]}])
def test_broken_preprocessing(broken):
    with pytest.raises(ValueError, match="the rule by which images are prepared is broken: "):
        Preprocessing.from_dict(broken)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"std": [0, 0, 0]}, r"std must have finite values above 0, got \[0, 0, 0\]"),
        ({"std": [1, 1, float("nan")]}, "std must have finite values above 0"),
        ({"mean": [0, 0, float("inf")]}, "mean must have finite values"),
        ({"mean": [0.5]}, "mean and std must both have 1 value .* or both 3 .*, got 1 and 3"),
        ({"mean": [0.5] * 4, "std": [0.5] * 4}, "got 4 and 4"),
    ],
)
def test_bad_image_folder_options(options, message):
    with pytest.raises(ValueError, match=message):
        ImageFolder("anywhere", **options)


def image_folder(root, parts=("train", "val"), classes=("ant", "bee"), mode="RGB"):
    for part in parts:
        for number, label in enumerate(classes):
            (root / part / label).mkdir(parents=True)
            for i in range(3):
                colour = (80 * i, 90 * number, 200) if mode == "RGB" else 80 * i
                Image.new(mode, (40, 30), colour).save(root / part / label / f"{i}.png")


def test_image_folder_needs_no_torchvision(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    image_folder(tmp_path)
    data = ImageFolder(str(tmp_path), batch_size=2, size=24, num_workers=0)
    data.setup("fit")
    assert data.class_names == ("ant", "bee")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        x, target = next(iter(loader))
        assert x.shape == (2, 3, 24, 24) and target.shape == (2,)
    image_folder(tmp_path, parts=("val",), classes=("cow",))
    with pytest.raises(UserError, match=r"has other classes than .*: cow"):
        ImageFolder(str(tmp_path)).setup()


@pytest.mark.parametrize("channels", [1, 3])
def test_training_and_evaluation_read_the_same_pixels(tmp_path, channels):
    image_folder(tmp_path)
    data = ImageFolder(str(tmp_path), size=24, num_workers=0, mean=[0.4] * channels, std=[0.2] * channels)
    data.setup()
    for i in range(6):  # pictures of one colour: no cutting out can change them
        trained, evaluated = data.parts[0][i], data.parts[1][i]
        torch.testing.assert_close(trained[0], evaluated[0])
        assert trained[0].shape == (channels, 24, 24) and trained[1] == evaluated[1]


def test_training_images_are_cut_out_and_mirrored_at_random():
    ramp = Image.linear_gradient("L").transpose(Image.Transpose.ROTATE_90)  # brightness changes from left to right
    torch.manual_seed(0)
    seen = [GREY.augmented(ramp)[0] for _ in range(40)]
    slopes = torch.stack([x[:, -1].mean() - x[:, 0].mean() for x in seen])
    assert 8 <= (slopes > 0).sum() <= 32  # mirrored in half of all cases
    assert slopes.abs().max() > 2 * slopes.abs().min() > 0  # of different size
    again = [GREY.augmented(ramp)[0] for _ in range(2)]
    torch.manual_seed(0)
    assert torch.equal(GREY.augmented(ramp)[0], seen[0]) and not torch.equal(again[0], again[1])


@pytest.mark.parametrize(("width", "height"), [(400, 300), (30, 500), (1, 900), (1, 1)])
def test_random_boxes_lie_inside_and_have_allowed_shapes(width, height):
    torch.manual_seed(0)
    boxes = [random_box(width, height) for _ in range(300)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
    if min(width, height) == 300:
        areas = torch.tensor([(r - x) * (b - t) / (width * height) for x, t, r, b in boxes])
        shapes = torch.tensor([(r - x) / (b - t) for x, t, r, b in boxes])
        assert areas.min() < 0.15 and areas.max() > 0.9 and 0.35 < areas.mean() < 0.5
        assert shapes.min() > 0.73 and shapes.max() < 1.36 and (shapes < 1).float().mean() == pytest.approx(0.5, abs=0.1)


def test_random_boxes_are_torchvisions_kind():
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision (extra [vision]) is not installed", exc_type=ImportError)
    image = torch.zeros(3, 300, 400)
    areas = [[h * w for _, _, h, w in (transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(500))]]
    areas.append([(r - x) * (b - t) for x, t, r, b in (random_box(400, 300) for _ in range(500))])
    theirs, ours = (torch.tensor(values, dtype=torch.float) / 120000 for values in areas)
    torch.testing.assert_close(ours.quantile(torch.tensor([0.1, 0.5, 0.9])), theirs.quantile(torch.tensor([0.1, 0.5, 0.9])), rtol=0, atol=0.08)
