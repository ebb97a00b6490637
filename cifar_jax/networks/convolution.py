"""The convolutions of the networks, in forms that XLA runs fast; results differ only by rounding.

On a CPU, three things are slow with JAX's own form.

The first layer: XLA multiplies one pixel's window by the kernel, and with three input channels and
few output channels that product is too small to be efficient. Computing the four pixels of a 2x2
window at once, from the 4x4 pixels around them, takes 16/9 of the arithmetic but at most half the
time.

Layers with many channels: they are bound by multiplications, of which
:mod:`cifar_jax.networks.winograd` needs half.

Gradients inside a loop: only outside of loops does XLA bring a convolution into the form of its
fast routine (batch, rows, columns, channels); in ``lax.scan`` it runs a gradient's convolution up
to 70 times slower. Written in that form from the start, they take the same time everywhere and give
the same bits (with Winograd's form, for many channels, the same to rounding).

On a GPU, airbench's first two convolutions are slow: 3 and 24 channels leave the matrix units idle.
Taking two neighbouring columns as one pixel with twice the channels, in and out, needs more
arithmetic, 4/3 of it for a 3x3 kernel, but less time (experiments/airbench/README.md). Most other
shapes gain nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from cifar_jax.networks import winograd
from cifar_jax.networks.winograd import Padding

_MAX_IN_CHANNELS = 4  # that is, images; with 16 channels in, both forms take the same time
_MAX_OUT_CHANNELS = 32  # with 64 out, the plain form is faster

_Convolution = Callable[..., jax.Array]
_Gradients = tuple[jax.Array, jax.Array]

_ALL_ROUND: Padding = ((1, 1), (1, 1))
_NHWC = ("NHWC", "HWIO", "NHWC")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv3x3(
    x: jax.Array, kernel: jax.Array, padding: Padding = _ALL_ROUND, paired: bool = False
) -> jax.Array:
    """The convolution with stride 1: ``[B, H, W, C]``, ``[3, 3, C, D]`` -> ``[B, H, W, D]``.

    Args:
        padding: 1 above and to the left; 0 below or to the right leaves out the last row or column
            of the output.
        paired: on a GPU take pairs of neighbouring columns together, for few channels.

    Raises:
        ValueError: the kernel or the padding is another one.
    """
    if kernel.shape[:2] != (3, 3) or any(a != 1 or b not in (0, 1) for a, b in padding):
        raise ValueError(
            "conv3x3 is for kernels of 3x3 and padding 1, or 0 below and to the right, not for "
            f"{kernel.shape[:2]} and {padding}: take flax.linen.Conv"
        )
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_on_cpu(x, kernel, padding), padding=padding),
        default=functools.partial(_on_gpu(paired), padding=padding),
    )


def plain_conv(
    x: jax.Array, kernel: jax.Array, padding: Padding = _ALL_ROUND, stride: int = 1
) -> jax.Array:
    """JAX's own convolution: ``[B, H, W, C]``, ``[S, S, C, D]`` -> ``[B, H', W', D]``."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        # Explicit: with a stride, "SAME" would pad other sides than PyTorch does.
        padding=padding,
        dimension_numbers=_NHWC,
    )


def _four_at_once(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    batch, height, width, _ = x.shape
    features = kernel.shape[-1]
    # [4, 4, C, 4D]: the kernel at its four places in the window, side by side.
    places = [(row, column) for row in (0, 1) for column in (0, 1)]
    kernels = [
        jnp.pad(kernel, ((row, 1 - row), (column, 1 - column), (0, 0), (0, 0)))
        for row, column in places
    ]
    y = plain_conv(x, jnp.concatenate(kernels, axis=-1), padding, stride=2)
    y = y.reshape(batch, height // 2, width // 2, 2, 2, features)
    return y.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, features)


def _on_cpu(x: jax.Array, kernel: jax.Array, padding: Padding) -> _Convolution:
    _, height, width, channels = x.shape
    small = channels <= _MAX_IN_CHANNELS and kernel.shape[-1] <= _MAX_OUT_CHANNELS
    if small and height % 2 == width % 2 == 0 and padding == _ALL_ROUND:
        return _four_at_once
    return winograd.convolve if winograd.pays(x, kernel) else plain_conv


def _on_gpu(paired: bool) -> _Convolution:
    return in_pairs if paired else plain_conv


def paired_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution without padding: ``[B, H, W, C]``, ``[2, 2, C, D]`` -> ``[B, H-1, W-1, D]``.

    On a GPU it takes pairs of neighbouring columns together, by :func:`in_pairs`.
    """
    none: Padding = ((0, 0), (0, 0))
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(plain_conv, padding=none),
        default=functools.partial(in_pairs, padding=none),
    )


def in_pairs(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """The convolution ``[B, H, W, C]``, ``[S, S, C, D]`` -> ``[B, H', W', D]``, S at most 3.

    Computed with two neighbouring columns as one pixel of twice the channels, in and out.
    """
    side, _, channels, features = kernel.shape
    (above, below), (left, right) = padding
    width = x.shape[2] + left + right - side + 1
    odd = width % 2
    unaligned = -channels % 4  # so that a pair is a multiple of 16 bytes
    x = jnp.pad(x, ((0, 0), (above, below), (left, right + odd + 3 - side), (0, unaligned)))
    x = x.reshape(*x.shape[:2], -1, 2 * x.shape[3])  # nothing moves in memory
    # A pair of outputs reads four columns: the kernel at its two places among them, side by side.
    kernels = [
        jnp.pad(kernel, ((0, 0), (place, 4 - side - place), (0, unaligned), (0, 0)))
        for place in (0, 1)
    ]
    both = jnp.concatenate(kernels, axis=-1).reshape(side, 2, x.shape[3], 2 * features)
    y = plain_conv(x, both, padding=((0, 0), (0, 0)))
    return y.reshape(*y.shape[:2], width + odd, features)[:, :, :width]


def _forward(
    x: jax.Array, kernel: jax.Array, padding: Padding, paired: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return conv3x3(x, kernel, padding, paired), (x, kernel)


def _backward(
    padding: Padding, paired: bool, inputs: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> _Gradients:
    return lax.platform_dependent(
        *inputs,
        gradient,
        cpu=functools.partial(_gradients_as_convolutions, padding),
        default=functools.partial(_gradients, padding, paired),
    )


def _gradients(
    padding: Padding, paired: bool, x: jax.Array, kernel: jax.Array, gradient: jax.Array
) -> _Gradients:
    convolve = functools.partial(_on_gpu(paired), padding=padding)
    dx, dkernel = jax.vjp(convolve, x, kernel)[1](gradient)
    return dx, dkernel


def _gradients_as_convolutions(
    padding: Padding, x: jax.Array, kernel: jax.Array, gradient: jax.Array
) -> _Gradients:
    """The gradients with respect to ``x`` and ``kernel``, each a convolution.

    The first convolves ``gradient`` with the kernel rotated by 180 degrees, the second ``x`` with
    ``gradient``.
    """
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    (above, below), (left, right) = padding
    back = ((2 - above, 2 - below), (2 - left, 2 - right))
    if winograd.pays(x, kernel):
        dx = winograd.convolve(gradient, winograd.laid_out(turned), back)
        return dx, winograd.kernel_gradient(x, gradient, padding)
    dx = plain_conv(gradient, turned, back)
    # [C, H, W, B] by [H, W, B, D] -> [C, 3, 3, D]: the images are the channels here.
    dkernel = plain_conv(x.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3), padding)
    return dx, dkernel.transpose(1, 2, 0, 3)


conv3x3.defvjp(_forward, _backward)
