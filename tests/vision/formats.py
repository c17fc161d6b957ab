"""Small data sets in the true on-disk formats of MNIST, CIFAR, SVHN, WebDataset and Hugging Face, written by tests."""

import gzip
import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image
from scipy.io import savemat


def pictures(count: int, channels: int = 3, side: int = 32, classes: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random bytes [N, C, side, side], and classes of which each comes equally often."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, channels, side, side), dtype=np.uint8), np.arange(count) % classes


def idx(array: np.ndarray) -> bytes:
    """An IDX file of bytes."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, packed: bool = True, train: int = 40, test: int = 20) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The four files of MNIST and Fashion-MNIST; what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for seed, (part, count) in enumerate((("train", train), ("t10k", test))):
        images, labels = written[part] = pictures(count, 1, 28, seed=seed)
        for name, content in ((f"{part}-images-idx3-ubyte", idx(images[:, 0])), (f"{part}-labels-idx1-ubyte", idx(labels))):
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return written


class PythonTwo(pickle._Pickler):
    """Writes pickles as Python 2 did, in which CIFAR is distributed: texts and bytes are both its byte strings."""

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)

    def save_text(self, value) -> None:
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(content)) + content)

    dispatch[str] = dispatch[bytes] = save_text


def python_two(value) -> bytes:
    """The pickle, with the names that NumPy's modules had then."""
    file = io.BytesIO()
    PythonTwo(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def cifar_files(classes: int, form: str, train: int = 40, test: int = 20) -> tuple[str, dict[str, bytes], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The folder's name, its files, and what is in them; form: "pickled" (as Python 2 wrote it), "pickled by 3" or "binary"."""
    content = {part: pictures(count, classes=classes, seed=seed) for seed, (part, count) in enumerate((("train", train), ("test", test)))}
    names = [f"class{i}" for i in range(classes)]
    pieces = {name: (images, labels) for name, images, labels in _batches(classes, content)}
    if form == "binary":
        folder = "cifar-10-batches-bin" if classes == 10 else "cifar-100-binary"
        files = {}
        for name, (images, labels) in pieces.items():
            columns = [labels] if classes == 10 else [labels // 5, labels]
            files[f"{name}.bin"] = np.concatenate([np.stack(columns, 1).astype(np.uint8), images.reshape(len(images), -1)], 1).tobytes()
        files["batches.meta.txt" if classes == 10 else "fine_label_names.txt"] = "\n".join([*names, ""]).encode()
        return folder, files, content
    dump = python_two if form == "pickled" else lambda value: pickle.dumps(value, protocol=2)
    key, folder = ("labels", "cifar-10-batches-py") if classes == 10 else ("fine_labels", "cifar-100-python")
    files = {name: dump({"data": images.reshape(len(images), -1), key: labels.tolist()}) for name, (images, labels) in pieces.items()}
    files["batches.meta" if classes == 10 else "meta"] = dump({"label_names" if classes == 10 else "fine_label_names": names})
    return folder, files, content


def _batches(classes: int, content):
    if classes == 100:
        for part in ("train", "test"):
            yield part, *content[part]
        return
    images, labels = content["train"]
    for i, (some, their) in enumerate(zip(np.split(images, 5), np.split(labels, 5), strict=True), 1):
        yield f"data_batch_{i}", some, their
    yield "test_batch", *content["test"]


def write_cifar(root: Path, classes: int = 10, form: str = "pickled", archive: bool = False, **counts: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Writes one of CIFAR's forms below root; what is in it."""
    folder, files, content = cifar_files(classes, form, **counts)
    root.mkdir(parents=True, exist_ok=True)
    if archive:
        name = f"cifar-{classes}-{'binary' if form == 'binary' else 'python'}.tar.gz"
        with tarfile.open(root / name, "w:gz") as tar:
            for file, data in files.items():
                add(tar, f"{folder}/{file}", data)
        return content
    (root / folder).mkdir()
    for file, data in files.items():
        (root / folder / file).write_bytes(data)
    return content


def write_svhn(root: Path, parts=(("train", 40), ("test", 20))) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """MATLAB files of SVHN, in which the digit 0 has the label 10; what is in them, with digits."""
    root.mkdir(parents=True, exist_ok=True)
    written = {}
    for seed, (part, count) in enumerate(parts):
        images, digits = written[part] = pictures(count, seed=seed)
        savemat(root / f"{part}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": np.where(digits == 0, 10, digits)[:, None].astype(np.uint8)})
    return written


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """A file of an archive."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def png(pixels: np.ndarray) -> bytes:
    """[C, H, W], uint8, as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def one_colour(number: int, side: int = 20) -> np.ndarray:
    """A picture whose every pixel is `number`, so that no cutting out changes it."""
    return np.full((3, side, side), number, dtype=np.uint8)


def write_shards(root: Path, part: str, shards: int, each: int, classes: int = 2, first: int = 0) -> None:
    """Shards of pictures of one colour: the i-th of the data set has the colour first + i and the class of i modulo `classes`."""
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(root / f"{part}-{shard:03}.tar", "w") as tar:
            for i in range(shard * each, (shard + 1) * each):
                add(tar, f"{i:06}.png", png(one_colour(first + i)))
                add(tar, f"{i:06}.cls", str(i % classes).encode())


def write_folder(root: Path, parts=("train", "val"), classes=("ant", "bee"), each: int = 4, side: int = 40) -> None:
    """root/<part>/<class>/<i>.png, random."""
    rng = np.random.default_rng(0)
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(each):
                (root / part / name / f"{i}.png").write_bytes(png(rng.integers(0, 256, (3, side, side), dtype=np.uint8)))
