"""WebDataset shards, tar archives of images and labels: streamed from the disk, split over processes and their workers."""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import MissingPackageError, UserError, one_line
from . import decoding
from .base import IMAGENET_MEAN, IMAGENET_STD, ImageData, at_least
from .folders import EXTENSIONS
from .images import Preprocessing
from .loading import ResumableLoader
from .transforms import Augmentation, for_training


class WebDataset(ImageData):
    """Shards as the library `webdataset` writes them: files NAME.jpg (or .png, .webp, ...) and NAME.cls, the class as a number, for each image.

    Training goes through the shards in another order in each epoch, the same in all processes; each process and each worker has shards of
    its own, so there must be at least as many as processes, and better as many as workers in all. An epoch has `train_images` images,
    rounded down to whole batches; a worker whose shards hold fewer begins with them again. Validation and test read every image once.

    Args:
        root: folder of the shards.
        train_images: images in an epoch, most often all that the training shards hold.
        train: pattern of the training shards' names.
        val: of those for validation.
        test: of those for test; where there are none, test uses those for validation.
        class_names: the names of the classes; or a file classes.txt in `root` with a line for each.
        batch_size: images in a step of one process.
        size: pixels of a side.
        shuffle: images that wait in each worker's memory to be drawn at random.
        num_workers: processes that read images.
        mean: of each channel, in [0, 1]; default ImageNet's. One value: images become grey, for in_channels=1.
        std: likewise.
        bits: 8 rounds resized pixels to 256 steps, a quarter of the bytes for the device; 32 does not, for images of 16 bits.
        randaugment: operations of RandAugment on each training image; needs torchvision.
        magnitude: of RandAugment, 0 to 30.
        erasing: part of the training images in which a rectangle is erased; needs torchvision.
        mixup: alpha of mixup, 0 for none; needs torchvision.
        cutmix: alpha of CutMix, 0 for none; needs torchvision.

    Raises ValueError for numbers out of range.
    """

    def __init__(
        self,
        root: str,
        train_images: int,
        train: str = "train-*.tar",
        val: str = "val-*.tar",
        test: str = "test-*.tar",
        class_names: list[str] | None = None,
        batch_size: int = 32,
        size: int = 224,
        shuffle: int = 1000,
        num_workers: int = 2,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        bits: int = 8,
        randaugment: int = 0,
        magnitude: int = 9,
        erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__(batch_size, num_workers, Augmentation(0, False, randaugment, magnitude, erasing, mixup, cutmix))
        at_least("train_images", train_images, 1)
        at_least("shuffle", shuffle, 0)
        self.save_hyperparameters()
        self.root = Path(root)
        self.train_images, self.shuffle = train_images, shuffle
        self.patterns = (train, val, test)
        self.class_names = tuple(class_names or ())
        self.preprocessing = Preprocessing(size, tuple(mean), tuple(std), bits)

    def setup(self, stage: str | None = None) -> None:
        """Lists the shards; UserError where there are none, or fewer than processes; MissingPackageError without `webdataset`."""
        if self.parts:
            return
        try:
            import webdataset  # noqa: F401
        except ImportError as error:
            raise MissingPackageError("--data WebDataset needs the package webdataset, which is not installed: pip install webdataset") from error
        rank, world = self.rank_and_world()
        names = self.root / "classes.txt"
        if not self.class_names and names.is_file():
            self.class_names = tuple(names.read_text().splitlines())
        rule = self.preprocessing
        read = partial(for_training, read=partial(pixels, rule=rule, training=True), transform=self.image_transform())
        batches = max(1, self.train_images // (self.batch_size * world))
        parts = [Shards(self._shards(self.patterns[0], world), read, rank, world, (batches, self.batch_size), self.shuffle)]
        parts.append(Shards(self._shards(self.patterns[1], world), partial(pixels, rule=rule), rank, world))
        has_test = any(self.root.glob(self.patterns[2]))
        parts.append(Shards(self._shards(self.patterns[2], world), partial(pixels, rule=rule), rank, world) if has_test else parts[1])
        self.parts = parts

    def _shards(self, pattern: str, world: int) -> list[str]:
        found = sorted(str(path) for path in self.root.glob(pattern) if path.is_file())
        if not found:
            raise UserError(f"there are no shards {self.root / pattern}: give --data.root and --data.train, --data.val")
        if len(found) < world:
            raise UserError(f"there are {len(found)} shards {self.root / pattern} for {world} processes: each needs one of its own, so write smaller shards")
        return found

    def loader(self, part: int) -> DataLoader[Any]:
        """Of a part; that of training knows how many batches an epoch has."""
        shards: Shards = self.parts[part]
        options: dict[str, Any] = {"num_workers": min(self.num_workers, shards.own), "pin_memory": torch.cuda.is_available()}
        if part:
            return ResumableLoader(shards, self.batch_size, **options)
        trainer = self.trainer
        return EpochLoader(shards, self.batch_size, epoch=lambda: 0 if trainer is None else trainer.current_epoch, **options)


class Shards(IterableDataset[tuple[Tensor, int]]):
    """The images of the shards that belong to a process and its workers.

    Args:
        urls: all shards.
        read: a sample -> its image as a tensor.
        rank, world: of the process.
        epoch_of: batches of this process in an epoch and images in each, over and over where its shards hold fewer; None for every image
            once, in order.
        shuffle: images that wait to be drawn at random.
    """

    def __init__(
        self, urls: list[str], read: Callable[[Any], Tensor], rank: int, world: int, epoch_of: tuple[int, int] | None = None, shuffle: int = 0
    ) -> None:
        self.urls, self.read, self.rank, self.world, self.epoch_of, self.shuffle = urls, read, rank, world, epoch_of, shuffle
        self.epoch = 0
        """Sets the order of the shards; the loader counts it on."""

    @property
    def own(self) -> int:
        """The number of shards of this process, for which no more workers are of use."""
        return len(range(self.rank, len(self.urls), self.world))

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        urls = list(self.urls)
        if self.epoch_of is not None:
            random.Random(f"shards of epoch {self.epoch}").shuffle(urls)  # the same in all processes and workers
        urls = urls[self.rank :: self.world][number::workers]
        if self.epoch_of is None:
            yield from self._stream(urls, None)
            return
        seed = int(torch.randint(1 << 62, ()))  # torch has seeded each worker; without workers the process's own
        quota = len(range(number, self.epoch_of[0], workers)) * self.epoch_of[1]  # whole batches: each worker makes its own
        while quota > 0:
            given = 0
            for sample in islice(self._stream(urls, random.Random(seed)), quota):
                yield sample
                given += 1
            if not given:
                raise UserError(f"the shards {', '.join(urls[:3])} hold no images")
            quota, seed = quota - given, seed + 1

    def _stream(self, urls: list[str], rng: random.Random | None) -> Iterator[tuple[Tensor, int]]:
        """Every image of these shards once; at random where there is an rng."""
        import webdataset

        stages = [webdataset.SimpleShardList(urls), webdataset.tarfile_to_samples()]
        if rng is not None and self.shuffle > 1:
            stages.append(webdataset.shuffle(self.shuffle, initial=self.shuffle, rng=rng))
        samples = iter(webdataset.DataPipeline(*stages))
        while True:
            try:
                sample = next(samples)
            except StopIteration:
                return
            except Exception as error:  # of tarfile, or the library's words around it
                raise UserError(f"one of the shards {', '.join(urls[:3])} cannot be read: {one_line(error)}") from error
            yield self.read(sample), label(sample)


class EpochLoader(ResumableLoader):
    """A loader over shards, which have no length of their own: it has the number of batches, and tells the shards the epoch."""

    def __init__(self, shards: Shards, batch_size: int, epoch: Callable[[], int], **options: Any) -> None:
        super().__init__(shards, batch_size, drop_last=True, **options)
        assert shards.epoch_of is not None
        self._batches, self._epoch = shards.epoch_of[0], epoch

    def __len__(self) -> int:
        return self._batches

    def _one_pass(self) -> Iterator[Any]:
        self.dataset.epoch = self._epoch()  # type: ignore[attr-defined]
        yield from super()._one_pass()


def pixels(sample: dict[str, Any], rule: Preprocessing, training: bool = False) -> Tensor:
    """The image of a sample; UserError where it has none, or one that cannot be read."""
    name = _name(sample)
    key = next((key for key in sample if f".{key.lower()}" in EXTENSIONS), None)
    if key is None:
        raise UserError(f"the sample {name} has no image: one of {', '.join(EXTENSIONS)} must stand beside its .cls")
    return rule.pixels_of(decoding.load_bytes(sample[key], f"{name}.{key}"), f"{name}.{key}", training)


def label(sample: dict[str, Any]) -> int:
    """The class of a sample; UserError where it has none."""
    try:
        return int(sample["cls"])
    except (KeyError, ValueError):
        found = f"its .cls is {sample['cls'][:20]!r}" if "cls" in sample else "it has no .cls"
        raise UserError(f"the sample {_name(sample)} has no class: {found}, and it must be a number") from None


def _name(sample: dict[str, Any]) -> str:
    return f"{sample.get('__url__', '')}/{sample.get('__key__', '')}"
