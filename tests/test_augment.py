from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax.config import TrainConfig
from cifar_jax.errors import CifarJaxError
from cifar_jax.steps.augment import (
    check_augmentation,
    cutout,
    make_augmentation,
    random_crop,
    random_flip,
)

IMAGE = np.arange(6 * 6 * 2, dtype=np.uint8).reshape(6, 6, 2)
KEYS = jax.random.split(jax.random.key(0), 200)
MANY_KEYS = jax.random.split(jax.random.key(1), 4000)


def test_a_flip_is_a_mirror_half_of_the_time() -> None:
    flipped = np.asarray(jax.vmap(random_flip, (0, None))(MANY_KEYS, IMAGE))
    mirrored = (flipped == IMAGE[:, ::-1]).all(axis=(1, 2, 3))
    unchanged = (flipped == IMAGE).all(axis=(1, 2, 3))
    assert (mirrored ^ unchanged).all()
    assert 0.47 < mirrored.mean() < 0.53


def test_a_crop_is_a_window_of_the_reflected_image() -> None:
    padded = np.pad(IMAGE, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    windows = {
        padded[top : top + 6, left : left + 6].tobytes(): (top, left)
        for top in range(5)
        for left in range(5)
    }
    crops = np.asarray(jax.vmap(random_crop, (0, None, None))(MANY_KEYS, IMAGE, 2))
    counts = Counter(windows[crop.tobytes()] for crop in crops)
    assert set(counts) == set(windows.values())
    expected = len(MANY_KEYS) / len(windows)  # of each window as many
    assert all(abs(count - expected) < 0.35 * expected for count in counts.values())


def test_cutout_fills_a_square_and_nothing_else() -> None:
    fill = jnp.array([250, 251], np.uint8)
    wide = np.concatenate([IMAGE, IMAGE], axis=1)
    corners = set()
    for image in np.asarray(jax.vmap(cutout, (0, None, None, None))(KEYS, wide, 3, fill)):
        changed = (image != wide).any(axis=-1)
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        assert 1 < len(rows) <= 3
        assert 1 < len(columns) <= 3
        assert changed[np.ix_(rows, columns)].all()
        assert changed.sum() == len(rows) * len(columns)
        assert (image[changed] == np.asarray(fill)).all()
        corners.add((rows[0], columns[0]))
    assert len(corners) > 5 * 11 * 0.8, "its centre lies anywhere; some of it may lie outside"


def test_cutout_is_of_the_mean_colour() -> None:
    white = np.full((6, 6, 2), 255, np.uint8)
    augment = make_augmentation(TrainConfig(flip=False, crop=0, cutout=3), (0.5, 0.25))
    image = np.asarray(augment(KEYS[0], white))
    assert (image[(image != white).any(axis=-1)] == [128, 64]).all()
    assert (image != white).any()


def test_whether_an_image_is_mirrored_says_nothing_of_its_shift() -> None:
    rows, columns = np.indices((8, 8))
    image = np.stack([16 * rows, 16 * columns], axis=-1).astype(np.uint8)
    augment = make_augmentation(TrainConfig(flip=True, crop=3), (0.5, 0.5))
    seen = np.asarray(jax.vmap(augment, (0, None))(KEYS, image)).astype(int)
    mirrored = seen[:, 4, 4, 1] < seen[:, 4, 3, 1]
    shift = seen[:, 4, 4, 0]
    assert abs(shift[mirrored].mean() - shift[~mirrored].mean()) < 0.4 * shift.std()


def test_what_is_switched_off_leaves_the_image_alone() -> None:
    off = make_augmentation(TrainConfig(flip=False, crop=0, cutout=0), (0.5, 0.5))
    assert np.array_equal(off(KEYS[0], IMAGE), IMAGE)


def test_each_option_is_switched_on_alone() -> None:
    def changed_share(**options: int) -> float:
        config = TrainConfig(**{"flip": False, "crop": 0, "cutout": 0, **options})  # type: ignore[arg-type]
        augmented = jax.vmap(make_augmentation(config, (0.5, 0.5)), (0, None))(KEYS, IMAGE)
        assert augmented.dtype == IMAGE.dtype
        return float((np.asarray(augmented) != IMAGE).any(axis=(1, 2, 3)).mean())

    assert 0.3 < changed_share(flip=True) < 0.7
    assert 0.9 < changed_share(crop=2) < 1  # one window in 25 is the image itself
    assert changed_share(cutout=2) == 1


def test_a_shift_or_square_larger_than_the_images_is_refused() -> None:
    check_augmentation(TrainConfig(crop=6, cutout=6), (6, 8, 3))
    for config in (TrainConfig(crop=7), TrainConfig(crop=0, cutout=7)):
        with pytest.raises(
            CifarJaxError, match=r"--c\w+ 7 is more than .* 6x8 pixels. Fix: give a"
        ):
            check_augmentation(config, (6, 8, 3))
