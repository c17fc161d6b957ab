"""Files of the well-known data sets from where their authors or PyTorch keep them, checked; only ever on --data.download true."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UserError, one_line


@dataclass(frozen=True)
class Remote:
    """A file: its address, and the MD5 checksum that torchvision and the authors' pages give for it."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def _mnist(base: str, sums: tuple[str, str, str, str]) -> tuple[Remote, ...]:
    names = [f"{part}-{what}.gz" for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    return tuple(Remote(base + name, md5) for name, md5 in zip(names, sums, strict=True))


MNIST = _mnist(
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432", "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"),
)
FASHION_MNIST = _mnist(
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe", "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"),
)
CIFAR = {
    10: (Remote("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),),
    100: (Remote("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),),
}
SVHN = (
    Remote("http://ufldl.stanford.edu/housenumbers/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
    Remote("http://ufldl.stanford.edu/housenumbers/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
)
SVHN_EXTRA = Remote("http://ufldl.stanford.edu/housenumbers/extra_32x32.mat", "a93ce644f1a588dc4d68dda5feec44a7")


def fetch(files: tuple[Remote, ...], folder: Path) -> None:
    """Downloads what `folder` lacks; UserError where a file cannot be had or has another checksum. What is there already is left alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made: {error.strerror}") from error
    for file in files:
        if (folder / file.name).is_file():
            continue
        partial = folder / f".{file.name}.partial"
        try:
            torch.hub.download_url_to_file(file.url, str(partial))
            with partial.open("rb") as content:
                found = hashlib.file_digest(content, "md5").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.md5(content.read()).hexdigest()
            if found != file.md5:
                raise UserError(f"what came from {file.url} has the MD5 checksum {found}, it must be {file.md5}: try again, or get the file by other means")
            partial.replace(folder / file.name)
        except OSError as error:  # urllib's too
            raise UserError(f"{file.url} cannot be downloaded ({one_line(error)}): put the file into {folder} by other means") from error
        finally:
            partial.unlink(missing_ok=True)
