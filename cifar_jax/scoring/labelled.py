"""The labelled images that a trained network is scored on, and its logits for them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cifar_jax.checkpoints.trained import UNKNOWN_DATA, TrainedNetwork
from cifar_jax.config import SplitName
from cifar_jax.data.dataset import ImageFiles, Split
from cifar_jax.data.sources import load_splits
from cifar_jax.errors import DataError, shown
from cifar_jax.scoring.inference import make_logits

_BATCH_SIZE = 128


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """One split of a source, converted to a network's image size and label order.

    Attributes:
        name, digest: of the source, as in ``Dataset``.
        split: images of the network's shape, files or decoded, and labels in its class order.
        notice: what a reader must know before seeing any result.
    """

    name: str
    digest: str
    split: Split
    notice: str | None = None

    def __len__(self) -> int:
        return len(self.split)

    def pixels(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images at ``indices``, uint8 ``[N, H, W, C]``."""
        chosen = self.split.take(indices)
        if isinstance(chosen.images, ImageFiles):
            from cifar_jax.data.input_pipeline import decode

            return decode(chosen).pixels
        return chosen.pixels

    def file_name(self, index: int) -> str:
        """The class folder and file name of an image; if it is not a file, its number."""
        if isinstance(self.split.images, ImageFiles):
            path = os.fsdecode(self.split.images.paths[index])
            return shown("/".join(path.split(os.sep)[-2:]))
        return f"#{index}"


def load_labelled(
    network: TrainedNetwork,
    split: SplitName,
    *,
    data: str | None,
    data_dir: str | None,
    may_be_trained_on: bool = False,
) -> LabelledImages:
    """The images of ``split``, with the source split as in training.

    Args:
        data: a source as in ``cifar_jax.train``; None is the one that the network was trained on.
        may_be_trained_on: also accept a split drawn from other images than in training, which may
            contain images that were trained on.

    Raises:
        DataError: the source cannot be read, has other classes or images, or its split is drawn
            from other images than in training.
    """
    config = network.config
    source = data or config.data
    splits = load_splits(
        source,
        data_dir=data_dir or config.data_dir,
        image_size=config.image_size,
        val_fraction=config.val_fraction,
        max_train_examples=config.max_train_examples,
        seed=config.seed,
    )
    if set(splits.class_names) != set(network.class_names):
        given = f"--data {source}" if data else f"{splits.name}, taken as no --data is given,"
        raise DataError(
            f"{given} has the classes {', '.join(splits.class_names)}; the network was trained on "
            f"{', '.join(network.class_names)}",
            fix="give --data with the network's classes",
        )
    other_data = network.data_digest not in (UNKNOWN_DATA, splits.digest)
    if other_data and split in splits.drawn and not may_be_trained_on:
        raise DataError(
            f"the {split} images of {splits.name} are drawn at random, and the data is not that of "
            "training, or has changed since: some of them may have been trained on",
            fix="give the --data of training as it was, or images in a test/ folder beside train/",
        )
    chosen = {"train": splits.train, "val": splits.val, "test": splits.test}[split]
    if not len(chosen):
        raise DataError(
            f"--split {split}: {splits.name} has no such images",
            fix="give another --split",
        )
    images = chosen.images
    if isinstance(images, ImageFiles):
        shape = network.image_shape
        images = dataclasses.replace(images, shape=shape, resize=True, to_grey=True)
    elif chosen.image_shape != network.image_shape:
        given, wanted = ("x".join(map(str, s)) for s in (images.shape[1:], network.image_shape))
        raise DataError(
            f"the images of --data {source} are {given}, the network's {wanted}",
            fix="give a folder of image files, which are resized",
        )
    label_of = np.array([network.class_names.index(name) for name in splits.class_names], np.int32)
    in_its_order = Split(images, label_of[chosen.labels])
    return LabelledImages(splits.name, splits.digest, in_its_order, splits.notice)


def logits_of(network: TrainedNetwork, labelled: LabelledImages) -> NDArray[np.float32]:
    """The logits ``[N, K]`` of all images, in order; shows a progress bar."""
    logits = make_logits(network)
    pieces = []
    with tqdm(total=len(labelled), unit="images", desc="scoring", leave=False, disable=None) as bar:
        for images in _batches(labelled.split):
            pieces.append(logits(images))
            bar.update(len(images))
    return np.concatenate(pieces)


def _batches(split: Split) -> Iterator[NDArray[np.uint8]]:
    if isinstance(split.images, ImageFiles):
        from cifar_jax.data.input_pipeline import eval_batches

        for batch in eval_batches(split, batch_size=_BATCH_SIZE):
            yield batch["image"][batch["mask"] == 1]
    else:
        for start in range(0, len(split), _BATCH_SIZE):
            yield split.images[start : start + _BATCH_SIZE]
