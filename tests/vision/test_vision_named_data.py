"""Data modules over arrays and folders: parts, order, augmentation, bytes on the way, errors."""

import pickle
import sys

import formats
import pytest
import torch
from data_runs import InTraining, fitted_once
from lightning.pytorch import seed_everything
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from interflow_vision.data import CIFAR10, ImageFolder
from interflow_vision.data.arrays import Arrays, fitted, grey
from interflow_vision.data.images import Preprocessing
from interflow_vision.data.known import MNIST
from interflow_vision.data.order import SharedShuffle
from interflow_vision.data.splitting import held_out
from interflow_vision.data.transforms import Augmentation, random_crop, random_flip
from interflow_vision.errors import MissingPackageError, UserError


@pytest.fixture
def no_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)


# arrays in memory


def test_parts_are_the_files_parts(tmp_path):
    written = formats.write_cifar(tmp_path)
    data = CIFAR10(str(tmp_path), batch_size=7, validation=10)
    data.setup()
    assert [len(part) for part in data.parts] == [30, 10, 20]
    together = torch.cat([part.indices for part in data.parts[:2]])
    assert together.sort().values.tolist() == list(range(40))
    assert torch.bincount(data.parts[1].target[data.parts[1].indices]).tolist() == [1] * 10
    x, target = (torch.cat(each) for each in zip(*data.test_dataloader(), strict=True))
    assert torch.equal(x, torch.from_numpy(written["test"][0])) and target.tolist() == written["test"][1].tolist()
    x, target = (torch.cat(each) for each in zip(*data.val_dataloader(), strict=True))
    assert torch.equal(x, torch.from_numpy(written["train"][0])[data.parts[1].indices])
    again = CIFAR10(str(tmp_path), validation=10)
    again.setup()
    assert torch.equal(again.parts[1].indices, data.parts[1].indices)
    other = CIFAR10(str(tmp_path), validation=10, seed=1)
    other.setup()
    assert not torch.equal(other.parts[1].indices, data.parts[1].indices)


def test_training_images_are_augmented_and_the_others_are_not(tmp_path, no_torchvision):
    formats.write_cifar(tmp_path)
    data = CIFAR10(str(tmp_path), batch_size=30, validation=10)
    data.setup()
    torch.manual_seed(0)
    (x, target), (again, same) = (data.parts[0].__getitems__(range(30)) for _ in range(2))
    assert torch.equal(target, same) and not torch.equal(x, again) and x.dtype == torch.uint8
    plain = CIFAR10(str(tmp_path), batch_size=30, validation=10, crop=0, flip=False)
    plain.setup()
    assert torch.equal(plain.parts[0].__getitems__(range(30))[0], plain.parts[0].images[plain.parts[0].indices])


def test_normalisation_happens_after_the_transfer(tmp_path):
    formats.write_cifar(tmp_path)
    data = CIFAR10(str(tmp_path), validation=10)
    data.setup()
    x, target = next(iter(data.val_dataloader()))
    assert x.dtype == torch.uint8
    normal, same = data.on_after_batch_transfer((x, target), 0)
    expected = (x.double() / 255 - torch.tensor(data.preprocessing.mean).double()[:, None, None]) / torch.tensor(data.preprocessing.std).double()[:, None, None]
    torch.testing.assert_close(normal.double(), expected, rtol=1e-5, atol=1e-5)
    assert same is target


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [28, 32])
def test_arrays_give_what_files_of_the_same_images_give(tmp_path, channels, size):
    """`interflow predict` on PNG files sees what the training saw."""
    formats.write_mnist(tmp_path)
    data = MNIST(str(tmp_path), validation=10, size=size, mean=[0.1307] * channels, std=[0.3081] * channels)
    data.setup()
    images, _ = next(iter(data.test_dataloader()))
    x = data.on_after_batch_transfer((images, None), 0)[0]
    assert x.shape[1:] == (channels, size, size)
    for i in range(3):
        Image.fromarray(data.read()[1][0][i, 0].numpy()).save(tmp_path / "x.png")
        assert torch.equal(data.preprocessing.read(tmp_path / "x.png"), x[i])


def test_grey_is_pillows_grey():
    images = torch.from_numpy(formats.pictures(5)[0])
    expected = [torch.frombuffer(bytearray(Image.fromarray(x.permute(1, 2, 0).numpy()).convert("L").tobytes()), dtype=torch.uint8) for x in images]
    assert torch.equal(grey(images).flatten(1), torch.stack(expected))
    assert fitted(images, Preprocessing(16, (0.5,), (0.5,), 8)).shape == (5, 1, 16, 16)


def test_batches_are_one_indexing_and_single_images_the_same():
    images, target = torch.arange(40, dtype=torch.uint8).view(10, 1, 2, 2), torch.arange(10)
    part = Arrays(images, target, torch.tensor([7, 3, 5]))
    x, labels = next(iter(DataLoader(part, 3, collate_fn=part.collate)))
    assert labels.tolist() == [7, 3, 5] and torch.equal(x, images[[7, 3, 5]])
    assert torch.equal(part[1][0], images[3]) and part[1][1] == 3 and len(part) == 3


@pytest.mark.parametrize("images", [0, 40, 41])
def test_impossible_validation_parts(tmp_path, images):
    formats.write_mnist(tmp_path)
    if images == 0:
        with pytest.raises(ValueError, match="validation must be at least 1, got 0"):
            MNIST(str(tmp_path), validation=0)
        return
    with pytest.raises(UserError, match=f"validation must be at least 1 and leave some of the 40 training images, got {images}: give another"):
        MNIST(str(tmp_path), validation=images).setup()


def test_held_out_parts_are_disjoint_and_in_proportion():
    target = torch.tensor([0] * 90 + [1] * 10)
    training, validation = held_out(target, 20, 3)
    assert sorted([*training.tolist(), *validation.tolist()]) == list(range(100))
    assert target[validation].sum() == 2
    assert training.tolist() == sorted(training.tolist())


# the order


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_together_read_what_one_reads(world):
    data = list(range(20))
    seed_everything(4, verbose=False)
    alone = SharedShuffle(data)
    alone.set_epoch(2)
    order = list(alone)
    assert sorted(order) == data
    parts = [SharedShuffle(data, world, rank) for rank in range(world)]
    for part in parts:
        part.set_epoch(2)
    assert all(len(part) == len(list(part)) for part in parts)
    together = [i for step in zip(*parts, strict=True) for i in step]
    assert together[:20] == order and together[20:] == order[: len(together) - 20]
    alone.set_epoch(3)
    assert list(alone) != order


@pytest.mark.parametrize("world", [1, 3])
def test_the_order_is_torchs_distributed_sampler(world):
    seed_everything(4, verbose=False)
    for rank in range(world):
        ours, theirs = SharedShuffle(range(20), world, rank), DistributedSampler(range(20), world, rank, seed=4)
        assert list(ours) == list(theirs)


# transforms


def test_own_crop_shifts_each_image_and_pads_with_black():
    torch.manual_seed(0)
    x = torch.zeros(300, 2, 9, 9, dtype=torch.uint8)
    x[:, :, 4, 4] = 200
    moved = random_crop(x, 2)
    assert moved.shape == x.shape and moved.dtype == torch.uint8 and torch.equal(moved[:, 0], moved[:, 1])
    places = (moved[:, 0] == 200).nonzero()
    assert len(places) == 300
    offsets = places[:, 1:] - 4
    assert offsets.min() == -2 and offsets.max() == 2
    counts = torch.bincount((offsets[:, 0] + 2) * 5 + offsets[:, 1] + 2, minlength=25)
    assert counts.min() > 2  # every shift comes up
    assert torch.equal(random_crop(torch.full((4, 1, 5, 5), 7, dtype=torch.uint8), 0), torch.full((4, 1, 5, 5), 7, dtype=torch.uint8))


def test_own_flip_mirrors_half():
    torch.manual_seed(0)
    x = torch.arange(3, dtype=torch.uint8).expand(400, 1, 2, 3)
    mirrored = (random_flip(x)[:, 0, 0, 0] == 2).sum().item()
    assert 150 < mirrored < 250


@pytest.mark.parametrize("option", ["randaugment", "erasing", "mixup", "cutmix"])
def test_what_needs_torchvision_says_so(tmp_path, no_torchvision, option):
    formats.write_cifar(tmp_path)
    data = CIFAR10(str(tmp_path), validation=10, **{option: 1})
    with pytest.raises(MissingPackageError, match=rf"--data.{option}\) needs torchvision"):
        data.setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": -1}, "crop must be at least 0, got -1"),
        ({"erasing": 1.5}, "erasing must be between 0 and 1, got 1.5"),
        ({"magnitude": 31}, "magnitude must be between 0 and 30, got 31"),
        ({"mixup": float("nan")}, "mixup must be at least 0, got nan"),
        ({"randaugment": -1}, "randaugment must be at least 0"),
        ({"validation": 0}, "validation must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"size": 0}, "size must be at least 1"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        CIFAR10("anywhere", **options)


@pytest.mark.parametrize("step", [{"crop": 4}, {"flip": True}, {"randaugment": 2}, {"erasing": 1.0}])
def test_torchvisions_steps(step):
    pytest.importorskip("torchvision.transforms.v2", reason="torchvision (extra [vision]) is not installed", exc_type=ImportError)
    torch.manual_seed(0)
    transform = Augmentation(**step).of_images((0.5, 0.5, 0.5))
    x = torch.from_numpy(formats.pictures(16)[0])
    y = transform(x)
    assert y.shape == x.shape and y.dtype == torch.uint8
    assert len({int((a != b).sum()) for a, b in zip(x, y, strict=True)}) > 1  # each image its own
    torch.manual_seed(0)
    assert torch.equal(transform(x), y)
    pickle.loads(pickle.dumps(transform))  # for workers that are started anew
    if "erasing" in step:
        changed = (x != y).any(1)
        assert all(y[i, :, changed[i]].unique().tolist() == [128] for i in range(16))


@pytest.mark.parametrize("step", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_torchvisions_mixing_trains(tmp_path, step):
    pytest.importorskip("torchvision.transforms.v2", reason="torchvision (extra [vision]) is not installed", exc_type=ImportError)
    formats.write_cifar(tmp_path)
    data = CIFAR10(str(tmp_path), validation=10, batch_size=15, **step)
    data.setup()
    data.trainer = InTraining()
    x, target = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert x.shape == (15, 3, 32, 32) and target.shape == (15, 10)
    torch.testing.assert_close(target.sum(1), torch.ones(15))
    data.trainer.training = False
    assert data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)[1].shape == (10,)
    fitted_once(CIFAR10(str(tmp_path), validation=10, batch_size=15, **step), tmp_path)


# folders


def test_a_folder_is_read_as_bytes_and_evaluated_as_predict_reads(tmp_path):
    formats.write_folder(tmp_path)
    data = ImageFolder(str(tmp_path), size=24, num_workers=0)
    data.setup()
    x, target = next(iter(data.val_dataloader()))
    assert x.dtype == torch.uint8 and data.preprocessing.bits == 8
    normal = data.on_after_batch_transfer((x, target), 0)[0]
    files = [data.parts[1].sample(i)[0] for i in range(8)]
    assert torch.equal(normal, torch.stack([data.preprocessing.read(file) for file in files]))
    exact = ImageFolder(str(tmp_path), size=24, num_workers=0, bits=32)
    exact.setup()
    other = next(iter(exact.val_dataloader()))[0]
    assert other.dtype == torch.float32 and 0 < (other - x / 255).abs().max() <= 0.5 / 255 + 1e-6
    assert Preprocessing.from_dict(data.preprocessing.as_dict()) == data.preprocessing
    assert Preprocessing.from_dict({"size": 8, "mean": [0.5], "std": [0.5]}).bits == 32  # of checkpoints from before
    with pytest.raises(ValueError, match="bits must be 8 or 32, got 16"):
        ImageFolder(str(tmp_path), bits=16)


def test_names_of_files_take_little_memory(tmp_path):
    formats.write_folder(tmp_path, classes=("ant", "bee", "cow"), each=3)
    data = ImageFolder(str(tmp_path), num_workers=0)
    data.setup()
    part = data.parts[0]
    assert [part.sample(i) for i in range(9)] == [(tmp_path / "train" / name / f"{i}.png", k) for k, name in enumerate(("ant", "bee", "cow")) for i in range(3)]
    with pytest.raises(IndexError):
        part.sample(9)
    kept = sys.getsizeof(part._names) + sys.getsizeof(part._ends) + sys.getsizeof(part._first)
    assert kept < 1000 and not [value for value in vars(part).values() if isinstance(value, list) and len(value) > 3]
