"""Augmentation of one image: pure functions of a key, for use under ``vmap`` inside the step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import ImageShape
from cifar_jax.errors import UsageError

Augmentation = Callable[[jax.Array, jax.Array], jax.Array]


def random_flip(key: jax.Array, image: jax.Array) -> jax.Array:
    """Mirror ``image`` ``[H, W, C]`` left to right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1, :], image)


def random_crop(key: jax.Array, image: jax.Array, padding: int) -> jax.Array:
    """Shift ``image`` ``[H, W, C]`` by up to ``padding`` pixels each way; edges are reflected."""
    margins = ((padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(image, margins, mode="reflect")
    top, left = _random_integers(key, jnp.full(2, 2 * padding + 1))
    return lax.dynamic_slice(padded, (top, left, jnp.zeros_like(top)), image.shape)


def cutout(key: jax.Array, image: jax.Array, size: int, fill: jax.Array) -> jax.Array:
    """Fill a square of side ``size`` somewhere in ``image`` ``[H, W, C]`` with ``fill`` ``[C]``.

    The square's centre lies anywhere in the image, so that part of the square may lie outside
    (DeVries and Taylor, 2017, arXiv:1708.04552).
    """
    corner = _random_integers(key, jnp.array(image.shape[:2])) - size // 2
    return blank(image, corner, size, fill)


def blank(image: jax.Array, corner: jax.Array, size: int, fill: jax.Array | float) -> jax.Array:
    """Fill the square of side ``size`` that begins at ``corner``, int32 ``[2]``, with ``fill``."""
    height, width, _ = image.shape
    top, left = corner
    rows, columns = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
    inside = (rows >= top) & (rows < top + size) & (columns >= left) & (columns < left + size)
    return jnp.where(inside, fill, image)


def _random_integers(key: jax.Array, limits: jax.Array) -> jax.Array:
    """An integer in 0 .. limit-1 for each of a few small limits.

    ``jax.random.randint`` draws three times as many bits to avoid a bias that is negligible for
    limits as small as an image; these draws are a good part of the step's compilation.
    """
    return jnp.floor(jax.random.uniform(key, limits.shape) * limits).astype(jnp.int32)


def check_augmentation(config: TrainConfig, image_shape: ImageShape) -> None:
    """Check the sizes of crop and cutout against those of the images.

    Raises:
        UsageError: a shift or square is larger than the images.
    """
    height, width, _ = image_shape
    for option, pixels in (("--crop", config.crop), ("--cutout", config.cutout)):
        if pixels > min(height, width):
            raise UsageError(
                f"{option} {pixels} is more than there is in images of {height}x{width} pixels",
                fix=f"give a smaller {option}, or 0 for none",
            )


def make_augmentation(config: TrainConfig, mean: tuple[float, ...]) -> Augmentation:
    """All augmentation that ``config`` enables, as one function of (key, image uint8 [H, W, C])."""

    def augment(key: jax.Array, image: jax.Array) -> jax.Array:
        flip_key, crop_key, cutout_key = jax.random.split(key, 3)
        if config.flip:
            image = random_flip(flip_key, image)
        if config.crop:
            image = random_crop(crop_key, image, config.crop)
        if config.cutout:
            grey = jnp.round(255 * jnp.array(mean)).astype(image.dtype)
            image = cutout(cutout_key, image, config.cutout, grey)
        return image

    return augment
