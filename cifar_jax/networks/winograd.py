"""3x3 convolutions with half the multiplications, for CPUs, which are bound by them.

Winograd's F(4, 3) along the rows of an image: four outputs of a filter with three taps from six
products instead of twelve. Each product is a sum of pixels times a sum of taps, and each output a
sum of products (Winograd, 1980, Arithmetic Complexity of Computations; in the form of Lavin
and Gray, 2015, arXiv:1509.09308, section 4.1). Along the columns the convolution is unchanged, so
that the sums cost one pass over memory; the two-dimensional form saves more products but loses as
much to its passes. The rounding error grows from 1e-7 of the largest result to about 2e-6.

Each function processes a few images at a time, whose sums fit in the cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

_Carry = tuple[list[jax.Array], None]
Padding = tuple[tuple[int, int], tuple[int, int]]  # above and below, left and right

_TILE = 4  # pixels of a row that are computed together
# With fewer channels the sums cost what the products save. If part of a row's last tile is wasted,
# more are needed.
_MIN_CHANNELS, _MIN_CHANNELS_IN_VAIN = 32, 64
_IMAGES_AT_ONCE = 64


def pays(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether this form applies and is faster: float32, enough channels, rows of 3 pixels or more.

    It needs a fixed number of images, unlike an exported program, as it processes a few at a time.
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
    factors = _factors(kernel)
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
        gradient: the gradient with respect to its output, ``[B, H', W', D]``.
        padding: as in :func:`convolve`.
    """
    rows, _ = padding
    width = gradient.shape[2]

    def add_some_images(totals: list[jax.Array], cut: tuple[jax.Array, jax.Array]) -> _Carry:
        x, gradient = cut
        # [C, H, W, B] by [H, W, B, D] -> [C, 3, 1, D]: the images are the channels here.
        x_sums = _input_sums(laid_out(x.transpose(3, 1, 2, 0)), width)
        gradient_sums = _gradient_sums(laid_out(gradient.transpose(1, 2, 0, 3)))
        products = [
            _convolve_columns(a, b, rows)[:, :, 0]
            for a, b in zip(x_sums, gradient_sums, strict=True)
        ]
        return [total + product for total, product in zip(totals, products, strict=True)], None

    zeros = [jnp.zeros((x.shape[3], 3, gradient.shape[3]))] * (_TILE + 2)
    totals, _ = lax.scan(add_some_images, zeros, (_cut(x), _cut(gradient)))
    return _factors_gradient([total.transpose(1, 0, 2) for total in totals])


def laid_out(x: jax.Array) -> jax.Array:
    """``x``, stored in the order of its axes.

    Otherwise XLA keeps a transposed array's old layout, and transposes each array derived from it
    instead: here six sums, element by element, at up to three times the cost of all the rest.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


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


# These are lists of arrays, not single arrays, which XLA takes several times as long to slice.


def _factors(kernel: jax.Array) -> list[jax.Array]:
    """The six factors of a filter's three taps, each ``[3, C, D]``: G g in the paper.

    Args:
        kernel: ``[3, 3, C, D]``.
    """
    first, middle, last = (kernel[:, i] for i in range(3))
    outer, even, odd = first + last, first + 4 * last, 2 * middle
    return [
        first / 4,
        -(outer + middle) / 6,
        (middle - outer) / 6,
        (even + odd) / 24,
        (even - odd) / 24,
        last,
    ]


def _factors_gradient(f: list[jax.Array]) -> jax.Array:
    """The gradient ``[3, 3, C, D]`` with respect to the kernel, from those of :func:`_factors`.

    Args:
        f: the gradients with respect to the six factors, each ``[3, C, D]``.
    """
    a, b = f[1] + f[2], f[3] + f[4]
    taps = [
        f[0] / 4 - a / 6 + b / 24,
        (f[2] - f[1]) / 6 + (f[3] - f[4]) / 12,
        (b - a) / 6 + f[5],
    ]
    return jnp.stack(taps, axis=1)


def _input_sums(x: jax.Array, outputs: int) -> list[jax.Array]:
    """The six sums of each tile's pixels, each ``[B, H, W'/4, C]``: B^T d in the paper.

    Args:
        x: the input of the convolution, ``[B, H, W, C]``.
        outputs: the number of columns of its output; W' is that, rounded up to whole tiles.
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

    This is the gradient of :func:`_output_sums`.

    Args:
        g: the gradient with respect to the output, ``[H, W, B, D]``; W' is W, rounded up likewise.
    """
    g = jnp.pad(g, ((0, 0), (0, _whole_tiles(g.shape[1]) - g.shape[1]), (0, 0), (0, 0)))
    g0, g1, g2, g3 = (g[:, i::_TILE] for i in range(_TILE))
    a, b, c, d = g0 + g2, g1 + g3, g0 + 4 * g2, 2 * g1 + 8 * g3
    return [g0, a + b, a - b, c + d, c - d, g3]
