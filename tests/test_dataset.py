from __future__ import annotations

import numpy as np
import pytest

from cifar_jax.data import shapes
from cifar_jax.data.dataset import (
    Split,
    array_digest,
    channel_statistics,
    epoch_order,
    split_off,
    stratified_choice,
)


def test_a_stratified_choice_takes_each_class_its_share() -> None:
    labels = np.repeat(np.arange(3, dtype=np.int32), [100, 50, 10])
    for seed in range(5):
        chosen = stratified_choice(labels, 16, np.random.default_rng(seed))
        assert len(set(chosen)) == 16
        counts = np.bincount(labels[chosen], minlength=3)
        assert np.abs(counts - [10, 5, 1]).max() <= 1
    again = stratified_choice(labels, 16, np.random.default_rng(4))
    assert np.array_equal(chosen, again)
    assert not np.array_equal(chosen, stratified_choice(labels, 16, np.random.default_rng(5)))


def test_split_off_parts_the_data() -> None:
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    split = Split(images, np.repeat(np.arange(4, dtype=np.int32), 10))
    rest, held_out = split_off(split, 0.2, np.random.default_rng(0))
    assert np.bincount(held_out.labels).tolist() == [2, 2, 2, 2]
    together = np.concatenate([rest.pixels, held_out.pixels]).ravel()
    assert sorted(together) == list(range(40))
    for part in (rest, held_out):
        assert np.array_equal(part.labels, part.pixels.ravel() // 10)
    for n, count in ((2, 1), (10, 2)):  # of 0.38 and of 1.9 images
        assert len(split_off(split.take(np.arange(n)), 0.19, np.random.default_rng(0))[1]) == count


@pytest.mark.parametrize("channels", [1, 3])
def test_channel_statistics_are_numpys(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2345, 4, 5, channels), dtype=np.uint8)
    mean, std = channel_statistics(images)
    scaled = images / 255
    np.testing.assert_allclose(mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, scaled.std(axis=(0, 1, 2)), rtol=1e-12)


def test_a_constant_channel_can_be_divided_by() -> None:
    assert channel_statistics(np.full((2, 3, 3, 1), 51, np.uint8)) == ((0.2,), (1.0,))


def test_the_digest_tells_pixels_and_labels() -> None:
    images, labels = shapes.draw(20, seed=0)
    digest = array_digest(Split(images, labels))
    assert digest == array_digest(Split(images.copy(), labels.copy()))
    changed = images.copy()
    changed[7, 3, 2, 1] ^= 1
    assert digest != array_digest(Split(changed, labels))
    assert digest != array_digest(Split(images, labels[::-1]))
    both = [array_digest(Split(images, labels), Split(x, labels)) for x in (images, changed)]
    assert len({digest, *both}) == 3


def test_an_epochs_order_is_a_permutation_of_its_own() -> None:
    orders = {(seed, epoch): epoch_order(100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    for order in orders.values():
        assert sorted(order) == list(range(100))
    assert len({tuple(order) for order in orders.values()}) == 4
    assert np.array_equal(orders[1, 1], epoch_order(100, 1, 1))


def test_shapes_are_a_function_of_n_and_seed() -> None:
    images, labels = shapes.draw(250, seed=3)
    assert images.shape == (250, 32, 32, 3)
    assert images.dtype == np.uint8
    assert images.flags.c_contiguous
    assert np.bincount(labels).tolist() == [25] * 10
    again, _ = shapes.draw(250, seed=3)
    assert np.array_equal(images, again)
    other, _ = shapes.draw(250, seed=4)
    assert (images != other).mean() > 0.9


def test_no_pixel_of_shapes_tells_the_class() -> None:
    """The classes' mean images hardly differ: that is why a linear model fails on them."""
    images, labels = shapes.draw(4000, seed=0)
    means = np.stack([images[labels == label].mean(axis=0) for label in range(10)])
    assert means.std(axis=0).max() < 0.3 * images.std()
