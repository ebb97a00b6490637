"""tf.data: from files or arrays to batches. The only module that imports TensorFlow.

TensorFlow only decodes and batches: it sees no GPU, and the content of each batch is decided by
:func:`cifar_jax.data.dataset.epoch_order`, not by tf.data's shuffling.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib
import os
import sys
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cifar_jax.data.dataset import ImageFiles, Split, epoch_order
from cifar_jax.data.images import read_checked, undecodable
from cifar_jax.errors import CifarJaxError, DataError, ResourceError
from cifar_jax.system.files import lacks_room

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# TensorFlow reads this when it is imported; otherwise it logs notes on the processor, and repeats
# each error that Python already gets as an exception. JAX's own default is 1.
_level = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3" if _level == "1" else _level
# Importing Keras 3 takes a fifth of TensorFlow's import time. With this set, TensorFlow looks for
# an older Keras instead, which is hardly ever installed.
_keras = os.environ.get("TF_USE_LEGACY_KERAS", "")
os.environ["TF_USE_LEGACY_KERAS"] = "1"
# Triton comes with pip's usual PyTorch for Linux. If it is imported after TensorFlow, as PyTorch's
# optimizers do, the process crashes (3.7 beside 2.21); if it is imported before, it does not.
if "tensorflow" not in sys.modules:
    with contextlib.suppress(Exception):
        importlib.import_module("triton")
import tensorflow as tf

os.environ["TF_CPP_MIN_LOG_LEVEL"] = _level
os.environ["TF_USE_LEGACY_KERAS"] = _keras

tf.config.set_visible_devices([], "GPU")  # the accelerators belong to JAX

Batch = dict[str, NDArray[Any]]

# The errors of files that were refused before decoding, by path.
Refused = dict[bytes, CifarJaxError]

_PREFETCHED_BATCHES = 4
_ONE_A_CORE = tf.data.AUTOTUNE  # with autotuning off, one thread per core, at most 16
_DECODED_AT_ONCE = 500
_GROUP = 8  # images to be resized that are read together

ALL_ROWS = slice(None)


def train_batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    epochs: int,
    first_step: int = 0,
    rows: slice = ALL_ROWS,
) -> Iterator[Batch]:
    """Full batches from ``first_step`` to the end of the last epoch, in ``epoch_order``.

    Images beyond the last full batch are skipped in that epoch; the next epoch skips others.
    Nothing before ``first_step`` is read or decoded, and neither is anything outside ``rows``.

    Args:
        rows: which images of each batch to yield.

    Yields:
        ``image`` uint8 ``[B, H, W, C]`` and ``label`` int32 ``[B]``.
    """
    steps_per_epoch = len(split) // batch_size

    def index_batches(epoch: int) -> NDArray[np.int64]:
        order = epoch_order(len(split), seed, int(epoch))
        batches = order[: steps_per_epoch * batch_size].reshape(steps_per_epoch, batch_size)
        return batches[:, rows]

    def epoch_batches(epoch: tf.Tensor) -> tf.data.Dataset:
        indices = tf.numpy_function(index_batches, [epoch], tf.int64, stateful=False)
        shape = (steps_per_epoch, len(range(batch_size)[rows]))
        return tf.data.Dataset.from_tensor_slices(tf.ensure_shape(indices, shape))

    first_epoch, skipped_steps = divmod(first_step, steps_per_epoch)
    indices = tf.data.Dataset.range(first_epoch, epochs).flat_map(epoch_batches).skip(skipped_steps)
    return _fetch(indices, split)


def eval_batches(split: Split, *, batch_size: int, rows: slice = ALL_ROWS) -> Iterator[Batch]:
    """All images in order, the last batch padded.

    Args:
        rows: which images of each batch to yield.

    Yields:
        ``image`` uint8 ``[B, H, W, C]``, ``label`` int32 ``[B]`` and ``mask`` float32 ``[B]``,
        which is 1 for an image and 0 for padding (a copy of the first image).
    """
    n_batches = -(-len(split) // batch_size)
    indices = np.arange(n_batches * batch_size).reshape(n_batches, batch_size)[:, rows]
    mask = indices < len(split)
    batches = _fetch(tf.data.Dataset.from_tensor_slices(np.where(mask, indices, 0)), split)
    for batch, batch_mask in zip(batches, mask.astype(np.float32), strict=True):
        yield {**batch, "mask": batch_mask}


def _fetch(indices: tf.data.Dataset, split: Split) -> Iterator[Batch]:
    """The images and labels at each vector of indices."""
    labels = tf.constant(split.labels)
    images = split.images
    refused: Refused = {}
    if isinstance(images, ImageFiles):
        paths, decode = tf.constant(images.paths), _decoder(images, refused)

        def fetch(index: tf.Tensor) -> dict[str, tf.Tensor]:
            batch_paths = tf.gather(paths, index)
            return {"image": decode(batch_paths), "label": tf.gather(labels, index)}
    else:
        pixels = tf.constant(images)

        def fetch(index: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"image": tf.gather(pixels, index), "label": tf.gather(labels, index)}

    batches = indices.map(fetch, num_parallel_calls=_ONE_A_CORE, deterministic=True)
    return _elements(batches, images, refused)


def decode(split: Split) -> Split:
    """The same split with every file decoded into memory.

    Raises:
        DataError: names the first file that cannot be decoded or has another size.
    """
    assert isinstance(split.images, ImageFiles)
    files = split.images
    refused: Refused = {}
    pixels = np.empty((len(files), *files.shape), np.uint8)
    batches = (
        tf.data.Dataset.from_tensor_slices(files.paths)
        .batch(_DECODED_AT_ONCE)
        .map(_decoder(files, refused), num_parallel_calls=_ONE_A_CORE, deterministic=True)
    )
    start = 0
    with tqdm(total=len(files), unit="images", desc="decoding", disable=None) as progress:
        for batch in _elements(batches, files, refused):
            pixels[start : start + len(batch)] = batch
            start += len(batch)
            progress.update(len(batch))
    return Split(pixels, split.labels)


def _decoder(files: ImageFiles, refused: Refused) -> Callable[[tf.Tensor], tf.Tensor]:
    """A function from paths ``[B]`` to images uint8 ``[B, H, W, C]``."""
    height, width, channels = files.shape

    def read(paths: NDArray[np.object_]) -> NDArray[np.object_]:
        contents = np.empty(len(paths), object)
        for i, path in enumerate(paths):
            try:
                contents[i] = read_checked(files, path)
            except CifarJaxError as error:
                refused[path], contents[i] = error, b""  # the decoder fails on it
        return contents

    def decode(content: tf.Tensor) -> tf.Tensor:
        image = _decode(content, channels)
        if files.resize:
            # Without antialias, shrinking skips most of the pixels.
            resized = tf.image.resize(image, (height, width), antialias=True)
            return tf.cast(tf.round(tf.clip_by_value(resized, 0, 255)), tf.uint8)
        return image

    def decode_together(paths: tf.Tensor) -> tf.Tensor:
        contents = tf.numpy_function(read, [paths], tf.string, stateful=False)
        contents = tf.ensure_shape(contents, paths.shape)
        spec = tf.TensorSpec(files.shape, tf.uint8)
        return tf.map_fn(decode, contents, fn_output_signature=spec)

    def decode_in_groups(paths: tf.Tensor) -> tf.Tensor:
        def decode_group(i: tf.Tensor, groups: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
            images = decode_together(paths[i * _GROUP : (i + 1) * _GROUP])
            return i + 1, groups.write(i, images)

        n_groups = -(-tf.size(paths) // _GROUP)
        groups = tf.TensorArray(
            tf.uint8, n_groups, infer_shape=False, element_shape=(None, *files.shape)
        )
        # Not a loop in Python: on 3.13 its conversion by AutoGraph warns.
        _, groups = tf.while_loop(
            lambda i, _: i < n_groups, decode_group, (0, groups), parallel_iterations=1
        )
        return groups.concat()

    # Images that are resized may be photographs, and a whole batch of them take gigabytes.
    return decode_in_groups if files.resize else decode_together


def _decode(content: tf.Tensor, channels: int) -> tf.Tensor:
    # Decodes PNG too. INTEGER_ACCURATE gives the same pixels as Pillow; the default does not.
    return tf.io.decode_jpeg(content, channels=channels, dct_method="INTEGER_ACCURATE")


_running: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


def _elements(
    dataset: tf.data.Dataset, images: ImageFiles | NDArray[np.uint8], refused: Refused
) -> Iterator[Any]:
    """The elements of ``dataset`` as NumPy arrays, prefetched."""
    # Autotuning is off: its thread sometimes sleeps for seconds when a pipeline closes, and closing
    # waits for it. It was slower, too.
    options = tf.data.Options()
    options.autotune.enabled = False

    def elements() -> Generator[Any, None, None]:
        try:
            read_ahead = dataset.prefetch(_PREFETCHED_BATCHES).with_options(options)
            yield from read_ahead.as_numpy_iterator()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they would keep the pipeline alive
            if isinstance(error, tf.errors.OpError):
                raise _explained(error, images, refused) from error
            raise

    running = elements()
    _running.add(running)
    return running


@atexit.register
def _stop_running() -> None:
    """Close running pipelines at exit: their threads call Python, and would wait for it forever."""
    for elements in list(_running):
        elements.close()


def _explained(
    error: tf.errors.OpError, images: ImageFiles | NDArray[np.uint8], refused: Refused
) -> Exception:
    """The error of a pipeline, with the file that TensorFlow does not name."""
    if not isinstance(images, ImageFiles):
        return error
    for path in images.paths:
        if path in refused:
            return refused[path]
    # The decoder failed; only then are the files tried one by one.
    for path in tqdm(images.paths, "looking for the damaged file", unit="images", disable=None):
        try:
            _decode(read_checked(images, path), images.shape[2])
        except tf.errors.OpError:
            return undecodable(path)
    return error


def read_cifar10(data_dir: Path, *, download: bool) -> tuple[dict[str, Split], tuple[str, ...]]:
    """CIFAR-10 from tensorflow-datasets, decoded: the splits ``train`` and ``test``, class names.

    Raises:
        DataError: it is not prepared and cannot be downloaded.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder("cifar10", data_dir=data_dir)
        if download:
            builder.download_and_prepare()
        splits = {
            name: tfds.as_numpy(builder.as_dataset(split=name, batch_size=-1))
            for name in ("train", "test")
        }
    except Exception as error:  # tfds, TensorFlow and protobuf: some have no other base class
        what = f"tensorflow-datasets cannot prepare cifar10 in --data-dir {data_dir}: {error}"
        full = isinstance(error, OSError) and lacks_room(error)
        if full or os.strerror(errno.ENOSPC) in what:  # TensorFlow's error, wrapped by tfds
            fix = "free up space there, or give another --data-dir"
            raise ResourceError(what, fix=fix) from error
        fix = "delete its cifar10 folder there and try again, or give --data an archive"
        raise DataError(what, fix=fix) from error
    return (
        {
            name: Split(arrays["image"], arrays["label"].astype(np.int32))
            for name, arrays in splits.items()
        },
        tuple(builder.info.features["label"].names),
    )
