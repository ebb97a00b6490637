"""``--data SOURCE``: from a folder, an archive or a name to a ``Dataset``."""

from __future__ import annotations

import dataclasses
import http.client
import os
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cifar_jax.config import SplitName
from cifar_jax.data import archive, cifar10_archive, shapes
from cifar_jax.data.dataset import (
    Contents,
    Dataset,
    ImageFiles,
    Split,
    array_digest,
    channel_statistics,
    split_off,
    stratified_choice,
)
from cifar_jax.data.folders import read_folder
from cifar_jax.data.listing import folders_and_files, reading, too_few_classes
from cifar_jax.errors import CifarJaxError, DataError, ResourceError, UsageError, shown
from cifar_jax.system.lock import alone_in

NAMES = ("auto", "cifar10", "shapes")  # what --data may be besides a path

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
# How long to wait for that host before giving up on the network; tfds would retry for minutes.
_DOWNLOAD_TIMEOUT_SECONDS = 4
# The mean and std of a split too large for memory are estimated from this many of its images, or
# fewer if they are large.
_STATISTICS_SAMPLE = 10_000
_STATISTICS_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Source:
    """A source in three splits, before files are decoded; most attributes are ``Dataset``'s.

    Attributes:
        drawn: the splits that were drawn at random; changing or reordering the images changes the
            draw.
    """

    name: str
    digest: str
    class_names: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    drawn: frozenset[SplitName]
    notice: str | None


def check_source(source: str, image_size: int | None = None) -> None:
    """The quick checks of ``source``; :func:`load_dataset` does the others.

    Raises:
        DataError: it is not a name, folder of folders, or archive.
        UsageError: ``image_size`` is given for a name, whose images are not files.
    """
    if source in NAMES:
        if image_size is not None:
            raise _not_resized(source, image_size, (shapes.SIZE, shapes.SIZE))
        return
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        with reading(path):
            if not folders_and_files(path)[0]:
                raise too_few_classes(path, 0)
        return
    if path.is_file() and path.name.endswith(archive.SUFFIXES):
        return
    what = "is not a folder or .tar.gz archive" if path.exists() else "does not exist"
    raise DataError(
        f"--data {source} {what}",
        fix="give a folder of class folders, a .tar.gz of one, 'cifar10', 'shapes' or 'auto'",
    )


def is_here(source: str, data_dir: str | None) -> bool:
    """Whether ``source`` needs no download; ``auto`` does unless CIFAR-10 is prepared."""
    if source in ("auto", "cifar10"):
        return _is_prepared(_data_dir(data_dir))
    return source == "shapes" or os.path.exists(os.path.expanduser(source))


def load_splits(
    source: str,
    *,
    data_dir: str | None = None,
    image_size: int | None = None,
    val_fraction: float = 0.1,
    max_train_examples: int | None = None,
    seed: int = 0,
) -> Source:
    """Find ``source`` and split it, without decoding files.

    The arguments are the fields of ``TrainConfig`` of the same names.

    Raises:
        DataError: the source is missing, damaged, or not laid out as expected.
    """
    contents = _load(source, _data_dir(data_dir), image_size)
    train, val, test = contents.train, contents.val, contents.test
    drawn: set[SplitName] = set()
    if test is None:
        train, test = split_off(train, val_fraction, np.random.default_rng([seed, 1]))
        drawn |= {"train", "test"}
    rng = np.random.default_rng(seed)
    if val is None:
        train, val = split_off(train, val_fraction, rng)
        drawn |= {"train", "val"}
    if max_train_examples is not None and max_train_examples < len(train):
        train = train.take(stratified_choice(train.labels, max_train_examples, rng))
        drawn.add("train")
    return Source(
        contents.name,
        contents.digest,
        contents.class_names,
        train,
        val,
        test,
        frozenset(drawn),
        contents.notice,
    )


def load_dataset(
    source: str,
    *,
    data_dir: str | None = None,
    image_size: int | None = None,
    val_fraction: float = 0.1,
    max_train_examples: int | None = None,
    cache_mb: int = 2048,
    decode: Callable[[Split], Split] | None = None,
    seed: int = 0,
) -> Dataset:
    """Load ``source``; the other arguments are the fields of ``TrainConfig`` of the same names.

    The test split of a folder stays undecoded: its files are read when it is scored.

    Args:
        decode: decodes a split of files; None for TensorFlow's decoder.

    Raises:
        DataError: the source is missing, damaged, or not laid out as expected.
        UsageError: ``image_size`` is given for images that are not files.
    """
    splits = load_splits(
        source,
        data_dir=data_dir,
        image_size=image_size,
        val_fraction=val_fraction,
        max_train_examples=max_train_examples,
        seed=seed,
    )
    _check_trainable(source, splits, image_size)
    train, val = splits.train, splits.val
    sample = train
    if isinstance(train.images, ImageFiles):
        if decode is None:
            from cifar_jax.data import input_pipeline

            decode = input_pipeline.decode
        megabytes = (len(train) + len(val)) * np.prod(train.image_shape) / 2**20
        if megabytes <= cache_mb:
            train, val = decode(train), decode(val)
            sample = train
        else:
            rng = np.random.default_rng(seed)
            fitting = _STATISTICS_BYTES // int(np.prod(train.image_shape))
            count = max(1, min(_STATISTICS_SAMPLE, fitting))
            sample = decode(train.take(stratified_choice(train.labels, count, rng)))
    mean, std = channel_statistics(sample.pixels)
    return Dataset(
        splits.name,
        splits.digest,
        splits.class_names,
        train,
        val,
        splits.test,
        mean,
        std,
        splits.notice,
    )


def warn_of_absent_classes(data: Source | Dataset) -> None:
    """Print a warning if there is a class without an image to train on."""
    counts = np.bincount(data.train.labels, minlength=len(data.class_names))
    absent = [shown(data.class_names[label]) for label in np.flatnonzero(counts == 0)]
    if absent:
        more = " and others" if len(absent) > 5 else ""
        print(f"warning: no image of {', '.join(absent[:5])}{more} to train on")


def _check_trainable(source: str, splits: Source, image_size: int | None) -> None:
    if image_size is not None and not isinstance(splits.train.images, ImageFiles):
        raise _not_resized(source, image_size, splits.train.image_shape[:2])
    if not len(splits.train):
        raise DataError(
            f"--data {source} leaves no image to train on besides {len(splits.val)} for validation",
            fix="give more images, or a smaller --val-fraction",
        )


def _not_resized(source: str, image_size: int, size: tuple[int, int]) -> CifarJaxError:
    return UsageError(
        f"--image-size {image_size} with --data {source}, whose images are {size[0]}x{size[1]}",
        fix="leave it out: only image files are resized",
    )


def _data_dir(data_dir: str | None) -> Path:
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(os.path.expanduser(data_dir or default))


def _load(source: str, data_dir: Path, image_size: int | None) -> Contents:
    if source == "shapes":
        return _shapes()
    if source == "cifar10":
        if not _is_prepared(data_dir) and (obstacle := _download_obstacle()):
            raise DataError(
                f"--data cifar10: not prepared in {data_dir}, and cannot be downloaded: {obstacle}",
                fix="connect to a network, or give --data an archive or folder of CIFAR-10, or "
                "--data shapes, which needs none",
            )
        return _cifar10(data_dir)
    if source == "auto":
        if _is_prepared(data_dir) or not (obstacle := _download_obstacle()):
            return _cifar10(data_dir)
        return dataclasses.replace(_shapes(), notice=_shapes_notice(data_dir, obstacle))

    check_source(source)
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return read_folder(path, shown(path.resolve().name), data_dir, image_size)
    return _archive(path, data_dir, image_size)


# ------------------------------------------------------------------------ shapes, and CIFAR-10


def _shapes() -> Contents:
    train = Split(*shapes.draw(shapes.N_TRAIN, seed=0))
    test = Split(*shapes.draw(shapes.N_TEST, seed=1))
    return Contents("shapes", array_digest(train, test), shapes.CLASS_NAMES, train, test)


def _shapes_notice(data_dir: Path, obstacle: str) -> str:
    return (
        f"CIFAR-10 is not available: it is not prepared in {data_dir}, and cannot be\n"
        f"downloaded: {obstacle}.\n"
        "Using 'shapes' instead, ten classes of drawn figures.\n"
        "ACCURACY ON THEM SAYS NOTHING ABOUT CIFAR-10.\n"
        "For CIFAR-10, with a network:   --data cifar10\n"
        "or with an archive or folder:   --data cifar-10-binary.tar.gz"
    )


def _is_prepared(data_dir: Path) -> bool:
    # Looked up directly: asking tfds would cost the seconds of TensorFlow's import.
    return any(data_dir.glob("cifar10/[0-9]*/dataset_info.json"))


def _download_obstacle() -> str | None:
    """Why CIFAR-10 cannot be downloaded, or None if it can."""
    obstacle: list[str | None] = [f"no answer in {_DOWNLOAD_TIMEOUT_SECONDS} s"]

    def ask() -> None:
        request = urllib.request.Request(CIFAR10_URL, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_DOWNLOAD_TIMEOUT_SECONDS).close()
            obstacle[0] = None
        except (OSError, ValueError, http.client.HTTPException) as error:
            obstacle[0] = str(getattr(error, "reason", error)) or type(error).__name__

    # In a thread: resolving the host's name has a timeout of its own, which can be long.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_DOWNLOAD_TIMEOUT_SECONDS)
    return obstacle[0]


def _cifar10(data_dir: Path) -> Contents:
    from cifar_jax.data.input_pipeline import read_cifar10

    if _is_prepared(data_dir):
        splits, class_names = read_cifar10(data_dir, download=False)
    else:  # by one process at a time: tfds expects no other
        try:
            with alone_in(data_dir, "preparing CIFAR-10"):
                splits, class_names = read_cifar10(data_dir, download=not _is_prepared(data_dir))
        except OSError as error:
            raise ResourceError(
                f"cannot write to --data-dir {data_dir}: {error.strerror or error}",
                fix="give another --data-dir",
            ) from error
    train, test = splits["train"], splits["test"]
    return Contents("cifar10", array_digest(train, test), class_names, train, test)


# ------------------------------------------------------------------------------------ archives


def _archive(path: Path, data_dir: Path, image_size: int | None) -> Contents:
    if root := cifar10_archive.root_of(path):
        train, test, class_names = cifar10_archive.read(path, root)
        return Contents(shown(path.name), array_digest(train, test), class_names, train, test)
    folder = archive.extract_once(path, data_dir / "extracted")
    try:
        return read_folder(folder, shown(path.name), data_dir, image_size)
    except DataError as error:  # the user has to fix the archive, not what was extracted
        what = f"{path}, extracted: {error.what}"
        raise DataError(what, fix=f"in the archive, {error.fix}") from error
