"""3x3 convolutions with half the multiplications, for a CPU, which is bound by them.

Winograd's F(4, 3) along the rows of an image: four outputs of a filter of three taps from six
products in place of twelve. Each product is a sum of pixels times a sum of taps, and each output a
sum of products (Winograd, 1980, Arithmetic Complexity of Computations; in the form of Lavin
and Gray, 2015, arXiv:1509.09308, section 4.1). Along the columns the convolution stays what it is,
so the sums cost one pass over memory; the two-dimensional form saves more products and loses as
much to its passes. Rounding grows from 1e-7 of the largest result to some 2e-6.

Each function takes a few images at a time, whose sums fit in the cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_Carry = tuple[jax.Array, None]
Padding = tuple[tuple[int, int], tuple[int, int]]  # above and below, left and right

_TILE = 4  # pixels of a row that are computed together
# With fewer channels the sums cost what the products save. Where a row's last tile is computed in
# part in vain, more are needed.
_MIN_CHANNELS, _MIN_CHANNELS_IN_VAIN = 32, 64
_IMAGES_AT_ONCE = 64

# The paper's G ``[6, 3]``: from the taps of a filter to its factors in the six products.
_FACTORS = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    np.float32,
)


def pays(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether this form applies and is faster: float32, enough channels, rows of 3 pixels or more.

    Not where the number of images is open, as in an exported program: a few are taken at a time.
    """
    batch, _, width, _ = x.shape
    whole = width % _TILE == 0
    return (
        min(kernel.shape[2:]) >= (_MIN_CHANNELS if whole else _MIN_CHANNELS_IN_VAIN)
        and x.dtype == kernel.dtype == jnp.float32
        and width >= _TILE - 1
        and isinstance(batch, int)
    )


def convolve(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """The convolution with stride 1: ``[B, H, W, C]``, ``[3, 3, C, D]`` -> ``[B, H', W', D]``.

    Args:
        padding: 1 above and to the left.
    """
    factors = jnp.einsum("pw,hwcd->phcd", _FACTORS, kernel)
    rows, (_, right) = padding
    width = x.shape[2] - 1 + right

    def some_images(x: jax.Array) -> jax.Array:
        products = [
            _convolve_columns(a, b[:, None], rows)
            for a, b in zip(_input_sums(x, width), factors, strict=True)
        ]
        return _output_sums(products)[:, :, :width]

    y = lax.map(some_images, _cut(x))
    return y.reshape(-1, *y.shape[2:])


def kernel_gradient(x: jax.Array, gradient: jax.Array, padding: Padding) -> jax.Array:
    """The gradient of the loss with respect to the kernel, ``[3, 3, C, D]``.

    Args:
        x: the input of the convolution, ``[B, H, W, C]``.
        gradient: that with respect to its output, ``[B, H', W', D]``.
        padding: as in :func:`convolve`.
    """
    rows, _ = padding
    width = gradient.shape[2]

    def add_some_images(total: jax.Array, cut: tuple[jax.Array, jax.Array]) -> _Carry:
        x, gradient = cut
        # [C, H, W, B] by [H, W, B, D] -> [C, 3, 1, D]: the images are the channels here.
        sums = zip(
            _input_sums(x.transpose(3, 1, 2, 0), width),
            _gradient_sums(gradient.transpose(1, 2, 0, 3)),
            strict=True,
        )
        return total + jnp.stack([_convolve_columns(a, b, rows)[:, :, 0] for a, b in sums]), None

    zeros = jnp.zeros((len(_FACTORS), x.shape[3], 3, gradient.shape[3]))
    total, _ = lax.scan(add_some_images, zeros, (_cut(x), _cut(gradient)))
    return jnp.einsum("pw,pchd->hwcd", _FACTORS, total)


def _cut(x: jax.Array) -> jax.Array:
    """``[B, ...]`` -> ``[B/n, n, ...]``."""
    batch = len(x)
    images = max(n for n in range(1, _IMAGES_AT_ONCE + 1) if batch % n == 0)
    if images < _IMAGES_AT_ONCE // 4:  # too few to keep the cores busy
        images = batch
    return x.reshape(-1, images, *x.shape[1:])


def _convolve_columns(x: jax.Array, kernel: jax.Array, rows: tuple[int, int]) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), (rows, (0, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _whole_tiles(width: int) -> int:
    return -(-width // _TILE) * _TILE


def _input_sums(x: jax.Array, outputs: int) -> list[jax.Array]:
    """The six sums of each tile's pixels, each ``[B, H, W'/4, C]``: B^T d in the paper.

    Args:
        x: the input of the convolution, ``[B, H, W, C]``.
        outputs: the columns of its output; W' is as many, filled up to whole tiles.
    """
    width = _whole_tiles(outputs)
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, width + _TILE + 1 - x.shape[2]), (0, 0)))
    d = [padded[:, :, i : i + width : _TILE] for i in range(_TILE + 2)]
    a, b = d[4] - 4 * d[2], d[3] - 4 * d[1]
    c, e = d[4] - d[2], 2 * (d[3] - d[1])
    return [4 * d[0] - 5 * d[2] + d[4], a + b, a - b, c + e, c - e, 4 * d[1] - 5 * d[3] + d[5]]


def _output_sums(m: list[jax.Array]) -> jax.Array:
    """The outputs ``[B, H, W', D]``, four from each tile's six products: A^T m in the paper.

    Args:
        m: the products, each ``[B, H, W'/4, D]``.
    """
    even, odd = m[1] + m[2], m[1] - m[2]
    even2, odd2 = m[3] + m[4], m[3] - m[4]
    outputs = [
        m[0] + even + even2,
        odd + 2 * odd2,
        even + 4 * even2,
        odd + 8 * odd2 + m[5],
    ]
    batch, height, tiles, features = m[0].shape
    return jnp.stack(outputs, axis=3).reshape(batch, height, _TILE * tiles, features)


def _gradient_sums(g: jax.Array) -> list[jax.Array]:
    """The six sums of each tile's four gradients, each ``[H, W'/4, B, D]``: A g.

    That is how a gradient goes back through :func:`_output_sums`.

    Args:
        g: the gradient with respect to the output, ``[H, W, B, D]``; W' is W, filled up likewise.
    """
    g = jnp.pad(g, ((0, 0), (0, _whole_tiles(g.shape[1]) - g.shape[1]), (0, 0), (0, 0)))
    g0, g1, g2, g3 = (g[:, i::_TILE] for i in range(_TILE))
    a, b, c, d = g0 + g2, g1 + g3, g0 + 4 * g2, 2 * g1 + 8 * g3
    return [g0, a + b, a - b, c + d, c - d, g3]
