"""Files of MNIST, CIFAR and SVHN in every true form: read right, refused in one sentence when damaged, and nothing in them is executed."""

import gzip
import hashlib
import pickle
import tarfile

import formats
import numpy as np
import pytest
import torch
from scipy.io import savemat

from interflow_vision.data import cifar, downloads, idx, svhn
from interflow_vision.data.known import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST
from interflow_vision.errors import UserError

FASHION = "/usr/share/datasets/fashion-mnist"


def same(part, written) -> None:
    """A part is what was written, in order."""
    images, target = part
    assert images.dtype == torch.uint8 and target.dtype == torch.int64
    assert torch.equal(images, torch.from_numpy(written[0])) and target.tolist() == written[1].tolist()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", ["", "raw", "FashionMNIST/raw"])
def test_idx_files_wherever_they_lie(tmp_path, packed, below):
    written = formats.write_mnist(tmp_path / below, packed)
    train, test = FashionMNIST(str(tmp_path)).read()
    same(train, written["train"])
    same(test, written["t10k"])


def test_idx_files_with_a_dot_in_their_names(tmp_path):
    written = formats.write_mnist(tmp_path, packed=False)
    for file in list(tmp_path.iterdir()):
        file.rename(tmp_path / file.name.replace("-idx", ".idx"))
    same(MNIST(str(tmp_path)).read()[0], written["train"])


DAMAGED_IDX = {
    "cut": (lambda raw: raw[:-1], "is damaged: for 3 x 28 x 28 values it must have 2368 bytes, it has 2367"),
    "longer": (lambda raw: raw + b"x", "is damaged: for 3 x 28 x 28 values it must have 2368 bytes, it has 2369"),
    "floats": (lambda raw: b"\0\0\x0d\x03" + raw[4:], "is not an IDX file of bytes with 3 dimensions: it begins with 00 00 0d 03"),
    "empty": (lambda raw: b"", "is not an IDX file of bytes"),
    "huge": (lambda raw: raw[:4] + b"\xff" * 12, "is damaged: for 4294967295 x 4294967295 x 4294967295 values"),
}


@pytest.mark.parametrize("kind", DAMAGED_IDX)
@pytest.mark.parametrize("packed", [True, False])
def test_damaged_idx_files(tmp_path, kind, packed):
    change, message = DAMAGED_IDX[kind]
    content = change(formats.idx(formats.pictures(3, 1, 28)[0][:, 0]))
    path = tmp_path / ("x-idx3-ubyte.gz" if packed else "x-idx3-ubyte")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(UserError, match=message) as error:
        idx.read(path, 3)
    assert str(path) in str(error.value)


def test_a_cut_gzip_file(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(formats.idx(np.arange(100)))[:-20])
    with pytest.raises(UserError, match=r"x\.gz cannot be read: "):
        idx.read(tmp_path / "x.gz", 1)


def test_missing_and_unequal_idx_files(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*none for --data.root; --data.download true"):
        MNIST(str(tmp_path / "none")).setup()
    with pytest.raises(UserError, match="does not hold FashionMNIST: it needs train-images-idx3-ubyte.gz, .* --data.download true fetches them"):
        FashionMNIST(str(tmp_path)).setup()
    formats.write_mnist(tmp_path, packed=False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(formats.idx(np.arange(39) % 10))
    with pytest.raises(UserError, match="has 40 train images but 39 labels"):
        MNIST(str(tmp_path)).setup()
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(formats.idx(np.full(40, 10)))
    with pytest.raises(UserError, match="labels be below 10"):
        MNIST(str(tmp_path)).setup()


@pytest.mark.parametrize("form", ["pickled", "pickled by 3", "binary"])
@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_in_every_form(tmp_path, classes, form, archive):
    written = formats.write_cifar(tmp_path, classes, form, archive)
    data = (CIFAR10 if classes == 10 else CIFAR100)(str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    train, test = data.read()
    same(train, written["train"])
    same(test, written["test"])
    assert data.class_names == tuple(f"class{i}" for i in range(classes))
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked onto the disk


def test_the_test_writes_pickles_as_python_2_did():
    content = formats.python_two({"data": formats.pictures(2)[0].reshape(2, -1), "labels": [0, 1]})
    assert b"cnumpy.core.multiarray\n_reconstruct" in content and b"_codecs" not in content
    assert set(pickle.loads(content, encoding="bytes")) == {b"data", b"labels"}


class Attack:
    def __reduce__(self):
        return (print, ("executed",))


EVIL = {
    "a call": pickle.dumps({"data": Attack()}, protocol=2),
    "the system": b"cposix\nsystem\n(S'echo executed'\ntR.",
    "by attribute": b"cnumpy\ndtype.__class__\n.",
    "an array of objects": pickle.dumps({"data": np.array([print], dtype=object)}, protocol=2),
    "a function of NumPy": b"cnumpy\nfromfile\n(S'/etc/passwd'\ntR.",
}


@pytest.mark.parametrize("kind", EVIL)
def test_nothing_in_a_pickle_is_executed(tmp_path, kind, capfd):
    with pytest.raises(UserError, match=r"^data_batch_1 is not a pickle of CIFAR: (it asks for .*, which a data set does not need|it has an array of type)"):
        cifar.unpickled(EVIL[kind], "data_batch_1")
    assert "executed" not in "".join(capfd.readouterr())


DAMAGED_CIFAR = {
    "cut": ("data_batch_3", lambda raw: raw[:100], "data_batch_3 is not a pickle of CIFAR"),
    "a list": ("data_batch_1", lambda raw: pickle.dumps([1]), "holds a list, not a dictionary"),
    "other rows": ("test_batch", lambda raw: pickle.dumps({"data": np.zeros((2, 5), np.uint8), "labels": [0, 1]}, 2), "test_batch is not a batch of CIFAR-10"),
    "few labels": ("test_batch", lambda raw: pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, 2), "test_batch is not a batch of CIFAR-10"),
    "a label": ("test_batch", lambda raw: pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, 2), "labels from 10 to 10"),
    "names": ("batches.meta", lambda raw: pickle.dumps({"label_names": ["a"]}, 2), "batches.meta must hold 10 names of classes, it has 1"),
}


@pytest.mark.parametrize("kind", DAMAGED_CIFAR)
def test_damaged_cifar(tmp_path, kind):
    formats.write_cifar(tmp_path)
    name, change, message = DAMAGED_CIFAR[kind]
    path = tmp_path / "cifar-10-batches-py" / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        CIFAR10(str(tmp_path)).read()


def test_damaged_archives_and_none(tmp_path):
    with pytest.raises(UserError, match=r"there is no CIFAR-100 in .*: it must hold one of cifar-100-python, cifar-100-python.tar.gz, cifar-100-binary"):
        CIFAR100(str(tmp_path)).setup()
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz is damaged"):
        CIFAR10(str(tmp_path)).setup()
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        formats.add(tar, "cifar-10-batches-py/data_batch_1", b"")
    with pytest.raises(UserError, match=r"is not a pickle of CIFAR|has no file"):
        CIFAR10(str(tmp_path)).setup()
    (tmp_path / "b" / "cifar-10-batches-bin").mkdir(parents=True)
    (tmp_path / "b" / "cifar-10-batches-bin" / "data_batch_1.bin").write_bytes(b"x" * 3074)
    with pytest.raises(UserError, match=r"data_batch_1.bin is damaged: its 3074 bytes are not rows of 3073"):
        CIFAR10(str(tmp_path / "b")).setup()


def test_svhn(tmp_path):
    written = formats.write_svhn(tmp_path, (("train", 40), ("test", 20), ("extra", 30)))
    train, test = SVHN(str(tmp_path)).read()
    same(train, written["train"])
    same(test, written["test"])
    both = SVHN(str(tmp_path), extra=True).read()[0]
    assert len(both[1]) == 70 and torch.equal(both[0][40:], torch.from_numpy(written["extra"][0]))


def test_damaged_svhn(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*train_32x32.mat; --data.download true"):
        SVHN(str(tmp_path)).setup()
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(b"no matrix")
    with pytest.raises(UserError, match="is not a MATLAB file that can be read"):
        svhn.read(path)
    for content, message in (
        ({"X": np.zeros((32, 32, 3, 2), np.uint8)}, r"must have bytes X \[32, 32, 3, N\] and y"),
        ({"X": np.zeros((32, 32, 3, 2)), "y": np.ones((2, 1))}, "must have bytes X"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[0], [1]])}, "its labels must be 1 to 10, they are 0 to 1"),
    ):
        savemat(path, content)
        with pytest.raises(UserError, match=message):
            svhn.read(path)


def test_downloads_only_where_asked_checked_and_not_twice(tmp_path, monkeypatch, capfd):
    formats.write_mnist(tmp_path / "there")
    files = tuple(downloads.Remote((tmp_path / "there" / file.name).as_uri(), _md5(tmp_path / "there" / file.name)) for file in downloads.MNIST)
    monkeypatch.setattr(MNIST, "remote", files)
    with pytest.raises(UserError, match="--data.download true"):
        MNIST(str(tmp_path / "here")).setup()
    assert not (tmp_path / "here").exists()
    data = MNIST(str(tmp_path / "here"), download=True, validation=10)
    data.setup()
    assert len(data.parts[0]) == 30
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == sorted(file.name for file in files)
    for path in (tmp_path / "there").iterdir():
        path.unlink()
    MNIST(str(tmp_path / "here"), download=True, validation=10).setup()  # what is there is not fetched
    (tmp_path / "here" / files[0].name).unlink()
    with pytest.raises(UserError, match=r"cannot be downloaded .*: put the file into .*here by other means"):
        MNIST(str(tmp_path / "here"), download=True).setup()
    (tmp_path / "there" / files[0].name).write_bytes(b"something else")
    with pytest.raises(UserError, match=f"has the MD5 checksum .*, it must be {files[0].md5}"):
        MNIST(str(tmp_path / "here"), download=True).setup()
    assert not (tmp_path / "here" / files[0].name).exists() and not list((tmp_path / "here").glob(".*"))
    capfd.readouterr()


def _md5(path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_fashion_mnist_itself():
    try:
        data = FashionMNIST(FASHION)
        data.setup()
    except UserError as error:
        pytest.skip(f"Debian's package dataset-fashion-mnist is not installed: {error}")
    assert [len(part) for part in data.parts] == [55000, 5000, 10000]
    x, target = data.read()[0]
    assert torch.bincount(target).tolist() == [6000] * 10
    numbers = x.float() / 255
    assert (numbers.mean().item(), numbers.std().item()) == pytest.approx((0.2860, 0.3530), abs=5e-5)
    assert torch.bincount(data.parts[1].target[data.parts[1].indices]).tolist() == [500] * 10
