"""Initializers of ``airbench``: kernels that begin as the identity, and kernels that whiten images.

As in https://github.com/KellerJordan/cifar10-airbench (Jordan, 2024, arXiv:2404.00498, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Airbench's first convolution: its name in the parameters, and the side of its kernel.
WHITENING, WHITENING_SIDE = "Whitening", 2

Shape = tuple[int, ...]
Initializer = Callable[..., jax.Array]

# Added to the variances, so that those near zero are not amplified.
_WHITENING_EPS = 5e-4
_WHITENING_IMAGES = 5000  # about this many are enough


def uniform(fan_in: int) -> Initializer:
    """PyTorch's default initializer: uniform between -1 / sqrt(fan_in) and 1 / sqrt(fan_in)."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def partly_identity(key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
    """A kernel ``[3, 3, C, D]`` whose first C features copy the input channels.

    Those are ``torch.nn.init.dirac_``; any others, if D is larger, are :func:`uniform`.
    """
    rows, columns, channels, features = shape
    kernel = uniform(rows * columns * channels)(key, shape, dtype)
    n = min(channels, features)
    identity = jnp.zeros((rows, columns, channels, n), dtype)
    identity = identity.at[rows // 2, columns // 2, :n].set(jnp.eye(n, dtype=dtype))
    return kernel.at[..., :n].set(identity)


def unit_std(key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
    """A kernel ``[F, K]``, uniform, with a standard deviation of 1."""
    kernel = uniform(shape[0])(key, shape, dtype)
    return kernel / kernel.std(ddof=1)


def whiten(params: Any, images: jax.Array) -> Any:
    """``params`` of airbench, with a first convolution that whitens ``images``.

    Args:
        images: normalised, float32 ``[B, H, W, C]``.
    """
    kernel = whitening_kernel(images, WHITENING_SIDE)
    return {**params, WHITENING: {**params[WHITENING], "kernel": kernel}}


def whitening_stride(n: int) -> int:
    """The stride that picks about 5,000 of ``n`` images: evenly, as they may be sorted by class."""
    return max(n // _WHITENING_IMAGES, 1)


def whitening_kernel(images: jax.Array, side: int) -> jax.Array:
    """The kernel ``[side, side, C, 2 * side * side * C]`` that whitens ``images``.

    Its features are the principal directions of all patches of ``side`` by ``side`` pixels, each
    divided by the square root of its variance (about 0, not the mean), followed by their negatives,
    so that a GELU loses neither sign.

    Args:
        images: normalised, float32 ``[B, H, W, C]``.
    """
    channels = images.shape[-1]
    height, width = (size - side + 1 for size in images.shape[1:3])
    pixels = [
        images[:, row : row + height, column : column + width]
        for row in range(side)
        for column in range(side)
    ]
    squares = jnp.concatenate(pixels, axis=-1).reshape(-1, side * side * channels)
    covariance = jnp.dot(squares.T, squares, precision=lax.Precision.HIGHEST) / len(squares)
    variances, directions = jnp.linalg.eigh(covariance)  # a direction is a column
    scaled = directions / jnp.sqrt(variances + _WHITENING_EPS)
    kernel = jnp.concatenate([scaled, -scaled], axis=1)
    return kernel.reshape(side, side, channels, -1)
