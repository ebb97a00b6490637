"""2x2 max-pooling whose gradient is fast on a CPU.

``flax.linen.max_pool`` differentiates into ``select_and_scatter``, which on a CPU costs more than
all the convolutions of the tutorial's network together. Here the backward pass compares each pixel
with its window's maximum, which fuses into one pass over memory.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from cifar_jax.errors import DataError


def max_pool(x: jax.Array) -> jax.Array:
    """The maximum of each 2x2 window, stride 2: ``[B, H, W, C]`` -> ``[B, H//2, W//2, C]``.

    An odd last row or column is dropped, as in ``torch.nn.MaxPool2d(2, 2)``; and as there, the
    gradient of a window goes to the first of equal maxima.

    Raises:
        DataError: the images are smaller than a window.
    """
    return _max_pool_even(whole_windows(x))


def whole_windows(x: jax.Array) -> jax.Array:
    """``[B, H, W, C]`` without an odd last row or column.

    Raises:
        DataError: nothing is left.
    """
    _, height, width, _ = x.shape
    if min(height, width) < 2:
        raise DataError(
            f"the images are too small for the network: {height}x{width} pixels are left before a "
            "2x2 pool",
            fix="give larger images, or a network with fewer pools, such as --widths 16,32",
        )
    return x[:, : height // 2 * 2, : width // 2 * 2, :]


def _corners(x: jax.Array) -> list[jax.Array]:
    """The four pixels of every window in reading order, each ``[B, H//2, W//2, C]``."""
    return [x[:, row::2, column::2, :] for row in (0, 1) for column in (0, 1)]


@jax.custom_vjp
def _max_pool_even(x: jax.Array) -> jax.Array:
    return functools.reduce(jnp.maximum, _corners(x))


def _pool_and_winner(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    pooled = _max_pool_even(x)
    return pooled, first_winner(_corners(x), pooled)


def first_winner(corners: list[jax.Array], pooled: jax.Array) -> jax.Array:
    """The index, 0 to 3, of the first corner that equals ``pooled``: int8, of the same shape."""
    first, second, third, _ = (corner == pooled for corner in corners)
    winner = jnp.where(first, 0, jnp.where(second, 1, jnp.where(third, 2, 3)))
    return winner.astype(jnp.int8)  # all that the backward pass needs is one byte


def _forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    def together(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return lax.optimization_barrier(_pool_and_winner(x))

    # On a GPU, XLA would otherwise read x twice: for the maximum, and for its index.
    return lax.platform_dependent(x, cpu=_pool_and_winner, default=together)


def _backward(winner: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    batch, height, width, channels = gradient.shape
    windows = (batch, height, 2, width, 2, channels)

    def to_windows(y: jax.Array) -> jax.Array:
        return jnp.broadcast_to(y[:, :, None, :, None, :], windows)

    row = lax.broadcasted_iota(jnp.int8, windows, 2)
    column = lax.broadcasted_iota(jnp.int8, windows, 4)
    routed = jnp.where(to_windows(winner) == 2 * row + column, to_windows(gradient), 0)
    return (routed.reshape(batch, 2 * height, 2 * width, channels),)


_max_pool_even.defvjp(_forward, _backward)
