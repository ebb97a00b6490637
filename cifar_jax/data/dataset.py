"""Data sets: images and labels in three splits, class names, mean and std. NumPy only."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
from numpy.typing import NDArray

ImageShape = tuple[int, int, int]  # H, W, C


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Images that are still files, decoded on demand.

    Attributes:
        paths: bytes ``[N]``, as the file system spells them.
        shape: ``(H, W, C)`` of each decoded image.
        resize: whether images of another size are resized to ``shape``; otherwise they are refused.
        to_grey: whether colour images are converted to greyscale if ``shape`` has one channel;
            otherwise they are refused.
    """

    paths: NDArray[np.bytes_]
    shape: ImageShape
    resize: bool
    to_grey: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: NDArray[np.int64]) -> ImageFiles:
        return dataclasses.replace(self, paths=self.paths[indices])


@dataclasses.dataclass(frozen=True)
class Split:
    """Images, decoded (uint8 ``[N, H, W, C]``) or as files, and labels int32 ``[N]``."""

    images: NDArray[np.uint8] | ImageFiles
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> ImageShape:
        if isinstance(self.images, ImageFiles):
            return self.images.shape
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The images of a decoded split."""
        assert isinstance(self.images, np.ndarray), "the split is still files"
        return self.images

    def take(self, indices: NDArray[np.int64]) -> Split:
        return Split(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a source has: a :class:`Dataset` before it is split; splits that it lacks are None."""

    name: str
    digest: str
    class_names: tuple[str, ...]
    train: Split
    test: Split | None
    val: Split | None = None
    notice: str | None = None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set ready for training.

    Attributes:
        name: what people call it, e.g. ``"shapes"``.
        digest: SHA-256 that identifies the data: of pixels and labels or, for files, of their names
            and sizes.
        class_names: the name of each label, in label order.
        mean, std: of each channel of the training split, in units of 0..1.
        notice: what a reader must know before seeing any result.
    """

    name: str
    digest: str
    class_names: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notice: str | None = None

    @property
    def image_shape(self) -> ImageShape:
        return self.train.image_shape


def stratified_choice(
    labels: NDArray[np.int32], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Choose ``count`` of the examples (or all), from each class in proportion.

    Returns:
        Their indices, ascending.
    """
    # The k-th of a class's n examples, in random order, stands at (k + u) / n in the queue.
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + rng.uniform()) / len(members)
    return np.sort(np.argsort(position, kind="stable")[:count])


def split_off(split: Split, fraction: float, rng: np.random.Generator) -> tuple[Split, Split]:
    """Hold out a stratified ``fraction`` (at least one image); returns (the rest, held out)."""
    count = max(1, round(fraction * len(split)))
    held_out = stratified_choice(split.labels, count, rng)
    rest = np.setdiff1d(np.arange(len(split)), held_out, assume_unique=True)
    return split.take(rest), split.take(held_out)


def channel_statistics(
    images: NDArray[np.uint8],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation over all pixels of each channel, for images scaled to 0..1.

    Computed from a histogram of the 256 values: exact, and independent of the order of the images.
    The std of a constant channel is given as 1, so that it can be divided by.
    """
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(images.shape[-1]):
        # In pieces: bincount makes a copy eight times the size of what it counts.
        counts = np.zeros(256, np.int64)
        for start in range(0, len(images), 1000):
            piece = images[start : start + 1000, ..., channel]
            counts += np.bincount(piece.ravel(), minlength=256)
        share = counts / counts.sum()
        mean.append(float(share @ values))
        std.append(float(np.sqrt(share @ (values - mean[-1]) ** 2)) or 1.0)
    return tuple(mean), tuple(std)


def array_digest(*splits: Split) -> str:
    """SHA-256 over the pixels and labels of decoded splits."""
    sha256 = hashlib.sha256()
    for split in splits:
        sha256.update(repr(split.pixels.shape).encode())
        sha256.update(np.ascontiguousarray(split.pixels).data)
        sha256.update(np.ascontiguousarray(split.labels).data)
    return sha256.hexdigest()


def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch visits its ``n`` images: a pure function of (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(n)
