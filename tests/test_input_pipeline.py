from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cifar_jax.data import images, input_pipeline
from cifar_jax.data.dataset import ImageFiles, Split, epoch_order
from cifar_jax.data.images import probe_shape, read_checked, undecodable
from cifar_jax.data.input_pipeline import decode, eval_batches, tf, train_batches
from cifar_jax.data.sources import load_dataset, load_splits
from cifar_jax.errors import CifarJaxError, ExitCode


@pytest.fixture(scope="module")
def numbered() -> Split:
    """50 images whose every pixel is their number, labelled by it."""
    numbers = np.arange(50)
    images = np.broadcast_to(numbers[:, None, None, None], (50, 2, 2, 1)).astype(np.uint8)
    return Split(np.ascontiguousarray(images), numbers.astype(np.int32))


def labels_of(split: Split, **options: int) -> list[list[int]]:
    return [batch["label"].tolist() for batch in train_batches(split, **options)]


def test_training_batches_follow_the_epochs_orders(numbered: Split) -> None:
    batches = list(train_batches(numbered, batch_size=8, seed=7, epochs=2))
    assert len(batches) == 2 * 6
    for batch in batches:
        assert batch["image"].shape == (8, 2, 2, 1)
        assert batch["image"].dtype == np.uint8
        assert np.array_equal(batch["image"][:, 0, 0, 0], batch["label"])
    for epoch in (0, 1):
        seen = [label for batch in batches[6 * epoch : 6 * epoch + 6] for label in batch["label"]]
        assert seen == epoch_order(50, 7, epoch)[:48].tolist()


@pytest.mark.parametrize("first_step", [1, 5, 6, 7, 11])
def test_a_later_first_step_gives_the_same_tail(numbered: Split, first_step: int) -> None:
    whole = labels_of(numbered, batch_size=8, seed=7, epochs=2)
    tail = labels_of(numbered, batch_size=8, seed=7, epochs=2, first_step=first_step)
    assert tail == whole[first_step:]


def test_a_resume_reads_nothing_that_it_skips(tmp_path: Path) -> None:
    """Files of the skipped steps may even be gone."""
    paths = []
    for number in range(12):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.full((2, 2), number, np.uint8)).save(path)
        paths.append(str(path).encode())
    files = ImageFiles(np.array(paths), (2, 2, 1), resize=False)
    split = Split(files, np.arange(12, dtype=np.int32))
    for number in epoch_order(12, 0, 0)[:8]:
        (tmp_path / f"{number}.png").unlink()
    (batch,) = train_batches(split, batch_size=4, seed=0, epochs=1, first_step=2)
    assert batch["image"][:, 0, 0, 0].tolist() == epoch_order(12, 0, 0)[8:].tolist()


def test_evaluation_sees_every_image_once_and_in_order(numbered: Split) -> None:
    batches = list(eval_batches(numbered, batch_size=7))
    assert all(len(batch["mask"]) == len(batch["image"]) == 7 for batch in batches)
    seen = [
        label
        for batch in batches
        for label, real in zip(batch["label"], batch["mask"], strict=True)
        if real
    ]
    assert seen == list(range(50))


def test_streaming_and_decoding_once_give_the_same_batches(image_folder: Path) -> None:
    streamed = load_dataset(str(image_folder), cache_mb=0).train
    decoded = load_dataset(str(image_folder)).train
    options = {"batch_size": 16, "seed": 1, "epochs": 2, "first_step": 3}
    pairs = list(
        zip(train_batches(streamed, **options), train_batches(decoded, **options), strict=True)
    )
    assert len(pairs) == 7
    for one, other in pairs:
        assert np.array_equal(one["image"], other["image"])
        assert np.array_equal(one["label"], other["label"])


def test_decoded_images_keep_their_order_when_the_first_take_longest(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = load_splits(str(image_folder)).test
    assert isinstance(split.images, ImageFiles)
    first = split.images.paths[0]

    def slowly(files: ImageFiles, path: bytes) -> bytes:
        if path == first:
            time.sleep(0.3)
        return read_checked(files, path)

    monkeypatch.setattr(input_pipeline, "read_checked", slowly)
    monkeypatch.setattr(input_pipeline, "_DECODED_AT_ONCE", 4)
    assert np.array_equal(decode(split).pixels, images.decode(split).pixels)


def test_images_to_be_resized_are_not_all_read_before_they_are_decoded(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of photographs, a batch would take gigabytes."""
    unchanged, waiting, most = input_pipeline._decode, set(), 0

    def read(files: ImageFiles, path: bytes) -> bytes:
        nonlocal most
        content = read_checked(files, path)
        waiting.add(content)
        most = max(most, len(waiting))
        return content

    def note(content: bytes) -> bytes:
        waiting.remove(content)
        return content

    def decode_noted(content: tf.Tensor, channels: int) -> tf.Tensor:
        return unchanged(
            tf.ensure_shape(tf.numpy_function(note, [content], tf.string), ()), channels
        )

    monkeypatch.setattr(input_pipeline, "read_checked", read)
    monkeypatch.setattr(input_pipeline, "_decode", decode_noted)
    assert len(decode(load_splits(str(image_folder), image_size=4).train)) == 81
    assert not waiting
    assert 0 < most <= 8


def files_of(tmp_path: Path, *encoded: tuple[str, bytes], **options: bool) -> ImageFiles:
    paths = []
    for name, content in encoded:
        (tmp_path / name).write_bytes(content)
        paths.append(str(tmp_path / name).encode())
    shape = probe_shape(np.array(paths), None)
    return ImageFiles(np.array(paths), shape, resize=options.get("resize", False))


def encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((32, 32), Image.Resampling.BICUBIC)


def test_grey_images_among_coloured_ones_become_rgb(tmp_path: Path, photo: Image.Image) -> None:
    grey, coloured = encode(photo.convert("L"), "PNG"), encode(photo, "PNG")
    files = files_of(tmp_path, ("1", grey), ("2", coloured))
    assert files.shape == (32, 32, 3)
    pixels = decode(Split(files, np.zeros(2, np.int32))).pixels
    assert np.array_equal(pixels[0, ..., 0], np.asarray(photo.convert("L")))


def test_resizing_averages_what_it_shrinks(tmp_path: Path) -> None:
    checkerboard = np.indices((32, 32)).sum(axis=0) % 2 * 255
    content = encode(Image.fromarray(checkerboard.astype(np.uint8)), "PNG")
    (tmp_path / "board.png").write_bytes(content)
    path = np.array([str(tmp_path / "board.png").encode()])
    files = ImageFiles(path, probe_shape(path, 8), resize=True)
    pixels = decode(Split(files, np.zeros(1, np.int32))).pixels
    assert pixels.shape == (1, 8, 8, 1)
    assert np.abs(pixels.astype(int) - 127).max() <= 12, "without antialiasing it is all 0 or 255"


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def resize(path: Path) -> None:
    Image.new("RGB", (9, 8)).save(path)


def put_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.fault("C19")
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (remove, "is not there any more. Fix: put it back"),
        (cut, "is cut short"),
        (resize, "is 8x9, the first is 8x8"),
        (put_a_pipe, "is empty"),
    ],
)
def test_a_file_that_changes_under_way_is_named(
    change: Callable[[Path], None], what: str, image_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(image_folder, tmp_path / "data")
    split = load_dataset(str(tmp_path / "data")).test
    batches = train_batches(split, batch_size=1, seed=0, epochs=100)
    next(batches)
    for name in ("003.png", "004.png"):
        change(tmp_path / "data" / "test" / "cat" / name)
    with pytest.raises(CifarJaxError, match=f"test/cat/00[34].png {what}") as caught:
        list(batches)
    assert caught.value.exit_code == ExitCode.DATA


def test_the_first_bad_file_is_named(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is refused before a decoder sees it, or by the decoder."""
    files = load_splits(str(image_folder)).train.images
    assert isinstance(files, ImageFiles)
    bad = {files.paths[i] for i in (9, 11, 30)}
    refusable = set(bad)

    def refuse(files: ImageFiles, path: bytes) -> bytes:
        if path in refusable:  # once: it need not be so when it is asked for again
            refusable.remove(path)
            raise undecodable(path)
        return read_checked(files, path)

    def cut_short(files: ImageFiles, path: bytes) -> bytes:
        content = read_checked(files, path)
        return content[:-12] if path in bad else content

    for read in (refuse, cut_short):
        monkeypatch.setattr(input_pipeline, "read_checked", read)
        with pytest.raises(CifarJaxError, match="pixels cannot be decoded") as caught:
            decode(Split(files, np.zeros(len(files), np.int32)))
        assert os.fsdecode(files.paths[9]) in str(caught.value)


def test_a_command_ends_while_images_are_read_ahead(image_folder: Path) -> None:
    """However a pipeline was left: threads that call Python would wait for it for ever."""
    script = f"""
import sys, time
from cifar_jax.data import input_pipeline
from cifar_jax.errors import CifarJaxError
from cifar_jax.data.sources import load_splits

read_checked = input_pipeline.read_checked
def slowly(files, path):
    for _ in range(50):
        time.sleep(0.001)
    return b"damaged" if path == bad else read_checked(files, path)

input_pipeline.read_checked = slowly
split = load_splits({str(image_folder)!r}).train
bad = split.images.paths[0]
try:
    list(input_pipeline.train_batches(split, batch_size=8, seed=0, epochs=100))
except CifarJaxError as error:
    kept = error
bad = None
left = input_pipeline.train_batches(split, batch_size=8, seed=0, epochs=100)
next(left)
sys.exit(5)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert ended.returncode == 5, ended.stderr


def test_triton_is_loaded_before_tensorflow(tmp_path: Path) -> None:
    """After it, it crashes the process. One that cannot be loaded keeps nobody from training."""
    (tmp_path / "triton.py").write_text(
        "import sys; print('tensorflow' in sys.modules); raise RuntimeError('no driver')"
    )
    command = [sys.executable, "-c", "import cifar_jax.data.input_pipeline; print('loaded')"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines() == ["False", "loaded"]


def test_a_pipeline_is_not_tuned(
    numbered: Split, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what ends it now and then waits for the thread that tunes."""
    tuned = []

    def as_numpy_iterator(self: tf.data.Dataset) -> Any:
        tuned.append(self.options().autotune.enabled)
        return unchanged(self)

    unchanged = tf.data.Dataset.as_numpy_iterator
    monkeypatch.setattr(tf.data.Dataset, "as_numpy_iterator", as_numpy_iterator)
    files = load_splits(str(image_folder)).train
    next(train_batches(numbered, batch_size=8, seed=0, epochs=1))
    next(train_batches(files, batch_size=8, seed=0, epochs=1))
    next(eval_batches(numbered, batch_size=8))
    decode(files)
    assert tuned == [False] * 4


def test_an_error_of_no_file_is_left_as_it_is(numbered: Split) -> None:
    error = tf.errors.AbortedError(None, None, "the device is gone")
    assert input_pipeline._explained(error, numbered.images, {}) is error
