"""Data modules over WebDataset shards and Hugging Face data sets: parts, processes, columns, errors."""

import sys
import tarfile

import formats
import pytest
import torch
from data_runs import InTraining, fitted_once

from interflow_vision.data import HuggingFace, WebDataset
from interflow_vision.errors import MissingPackageError, UserError

# shards


def shards(tmp_path, **options) -> WebDataset:
    given = {"train_images": 12, "batch_size": 3, "size": 16, "num_workers": 0, "mean": [0.0] * 3, "std": [1.0] * 3}
    return WebDataset(str(tmp_path), **{**given, **options})


def colours(loader) -> list[int]:
    """The colours of the pictures that a loader gives, each of which has one."""
    return [int(image[0, 0, 0]) for x, _ in loader for image in x]


@pytest.fixture
def written_shards(tmp_path):
    pytest.importorskip("webdataset", reason="the package webdataset (extra [data]) is not installed", exc_type=ImportError)
    formats.write_shards(tmp_path, "train", 4, 3)
    formats.write_shards(tmp_path, "val", 2, 2, first=100)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_read_once_and_in_another_order_in_each_epoch(written_shards, workers):
    data = shards(written_shards, num_workers=workers)
    data.setup()
    data.trainer = InTraining()
    assert len(data.train_dataloader()) == 4
    torch.manual_seed(0)
    orders = []
    for data.trainer.current_epoch in (0, 1):
        orders.append(colours(data.train_dataloader()))
        assert sorted(orders[-1]) == list(range(12))
    assert orders[0] != orders[1] and orders[0] != list(range(12))
    assert sorted(colours(data.val_dataloader())) == [100, 101, 102, 103] == sorted(colours(data.test_dataloader()))
    labels = torch.cat([target for _, target in data.val_dataloader()])
    assert sorted(labels.tolist()) == [0, 0, 1, 1]


def test_shards_are_split_over_processes(written_shards):
    seen, held = [], []
    for rank in (0, 1):
        data = shards(written_shards, num_workers=1)
        data.trainer = InTraining()
        data.trainer.global_rank, data.trainer.world_size = rank, 2
        data.setup()
        assert len(data.train_dataloader()) == 2
        seen.append(colours(data.train_dataloader()))
        held.append(colours(data.val_dataloader()))
    assert sorted(seen[0] + seen[1]) == list(range(12)) and len(seen[0]) == len(seen[1]) == 6
    assert sorted(held[0] + held[1]) == [100, 101, 102, 103] and len(held[0]) == len(held[1])


def test_all_processes_have_the_same_number_of_batches(tmp_path):
    """Shards of unequal length: one begins again, where the other would wait for it for ever."""
    pytest.importorskip("webdataset", reason="the package webdataset (extra [data]) is not installed", exc_type=ImportError)
    formats.write_shards(tmp_path, "train", 1, 8)
    formats.write_shards(tmp_path / "b", "train", 1, 2, first=50)
    (tmp_path / "b" / "train-000.tar").rename(tmp_path / "train-001.tar")
    formats.write_shards(tmp_path, "val", 2, 1)
    for workers in (0, 2):
        counts = []
        for rank in (0, 1):
            data = shards(tmp_path, train_images=12, num_workers=workers)
            data.trainer = InTraining()
            data.trainer.global_rank, data.trainer.world_size = rank, 2
            data.setup()
            counts.append(len(colours(data.train_dataloader())))
        assert counts == [6, 6]


def test_shards_train_and_a_resumed_pass_goes_on(written_shards):
    data = shards(written_shards)
    data.setup()
    torch.manual_seed(0)
    loader = data.train_dataloader()
    batches = iter(loader)
    first = [next(batches)[0] for _ in range(2)]
    state = loader.state_dict()
    rest = [x for x, _ in batches]
    again = data.train_dataloader()
    again.load_state_dict(state)
    torch.manual_seed(5)
    went_on = [x for x, _ in again]
    assert len(first) == len(rest) == len(went_on) == 2
    assert all(torch.equal(a, b) for a, b in zip(rest, went_on, strict=True))
    trainer = fitted_once(shards(written_shards, class_names=["even", "odd"]), written_shards, num_classes=2)
    assert trainer.global_step == 2 and trainer.lightning_module.class_names == ("even", "odd")


def test_names_of_classes_from_a_file(written_shards):
    (written_shards / "classes.txt").write_text("even\nodd\n")
    data = shards(written_shards)
    data.setup()
    assert data.class_names == ("even", "odd")


def test_bad_shards(tmp_path, written_shards):
    with pytest.raises(UserError, match=r"there are no shards .*none-\*.tar: give --data.root and --data.train"):
        shards(tmp_path, train="none-*.tar").setup()
    few = shards(tmp_path)
    few.trainer = InTraining()
    few.trainer.world_size = 5
    with pytest.raises(UserError, match=r"there are 4 shards .* for 5 processes: each needs one of its own"):
        few.setup()
    with tarfile.open(tmp_path / "x-0.tar", "w") as tar:
        formats.add(tar, "a.cls", b"1")
    with tarfile.open(tmp_path / "x-1.tar", "w") as tar:
        formats.add(tar, "a.png", formats.png(formats.one_colour(1)))
    with tarfile.open(tmp_path / "x-2.tar", "w") as tar:
        formats.add(tar, "a.png", formats.png(formats.one_colour(1)))
        formats.add(tar, "a.cls", b"cat")
    with tarfile.open(tmp_path / "x-3.tar", "w") as tar:
        formats.add(tar, "a.png", b"no image")
        formats.add(tar, "a.cls", b"1")
    (tmp_path / "x-4.tar").write_bytes(b"no archive" * 100)
    for number, message in enumerate(("has no image: one of .jpg", "it has no .cls", r"its .cls is b'cat'", "a.png is not an image", "cannot be read")):
        data = shards(tmp_path, val=f"x-{number}.tar")
        data.setup()
        with pytest.raises(UserError, match=message) as error:
            list(data.val_dataloader())
        assert f"x-{number}.tar" in str(error.value)


# Hugging Face


@pytest.fixture
def hugging(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets (extra [data]) is not installed", exc_type=ImportError)
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})

    def write(splits=(("train", 20), ("test", 6)), rename=None):
        made = {}
        for name, count in splits:
            rows = {"image": [{"bytes": formats.png(formats.one_colour(i)), "path": None} for i in range(count)], "label": [i % 2 for i in range(count)]}
            made[name] = datasets.Dataset.from_dict(rows, features=features)
            made[name] = made[name].rename_columns(rename) if rename else made[name]
        folder = tmp_path / "saved"
        datasets.DatasetDict(made).save_to_disk(str(folder))
        return folder

    return write


def test_hugging_face_from_the_disk(hugging):
    folder = hugging()
    data = HuggingFace(str(folder), batch_size=4, size=16, validation=6, num_workers=0)
    data.setup()
    assert data.class_names == ("even", "odd") and [len(part) for part in data.parts] == [14, 6, 6]
    seen = [sorted(colours(loader)) for loader in (data.val_dataloader(), data.test_dataloader())]
    assert seen[1] == list(range(6)) and len(set(seen[0])) == 6
    x, target = next(iter(data.train_dataloader()))
    assert x.dtype == torch.uint8 and x.shape == (4, 3, 16, 16)
    assert (x[:, 0, 0, 0] % 2).tolist() == target.tolist()
    fitted_once(HuggingFace(str(folder), batch_size=4, size=16, validation=6, num_workers=0), folder, num_classes=2)


def test_hugging_face_columns_and_splits(hugging, tmp_path):
    folder = hugging((("train", 6), ("val", 4)), {"image": "img", "label": "fine"})
    data = HuggingFace(str(folder), image="img", label="fine", size=16, num_workers=0)
    data.setup()
    assert [len(part) for part in data.parts] == [6, 4, 4]
    with pytest.raises(UserError, match="the split 'train' of .* has no column 'image', only img, fine: give --data.image"):
        HuggingFace(str(folder)).setup()
    with pytest.raises(UserError, match="the column 'fine' of .* must have the feature Image"):
        HuggingFace(str(folder), image="fine", label="fine").setup()
    with pytest.raises(UserError, match="there is no folder .*none"):
        HuggingFace(str(tmp_path / "none")).setup()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is not a data set that save_to_disk has written"):
        HuggingFace(str(tmp_path / "empty")).setup()


@pytest.mark.parametrize(("package", "data"), [("webdataset", lambda root: shards(root)), ("datasets", lambda root: HuggingFace(str(root)))])
def test_missing_packages(tmp_path, monkeypatch, package, data):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=f"needs the package {package}, which is not installed: pip install {package}"):
        data(tmp_path).setup()
