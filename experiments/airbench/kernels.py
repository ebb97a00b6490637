"""Batch norm and GELU as one operation, with the max-pool before them: kernels for a GPU.

Most of what a run does outside of its convolutions is to move activations through these. As XLA
fuses them, the normalised input is written beside the output and read again, GELU's gradient too,
and sums take passes of their own. Here only the input ``x`` of the norm is kept, and a byte for the
pixel that won each window. This is how often activations move:

    forward     the pool, which also sums ``x`` and its squares: reads the pixels, writes ``x``
                norm and GELU, XLA's: reads ``x``, writes the output
    backward    the sums of the norm's gradient: reads ``x`` and the gradient of the output
                the gradient of ``x``: reads both again, writes that of all four pixels of a window

They are written in Pallas, and run through Triton. JAX 0.11 announces that it will drop Triton for
another way, which only the newest GPUs have; all releases that this project supports have Triton.

Activations are viewed as ``[R, C]``: a row for each pixel of each image, in their order in memory.
A block is some rows and some channels, both powers of two, as Triton needs. A program of the GPU
takes one block, or, to sum over them, several that follow each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from cifar_jax.networks.airbench import gelu, gelu_slope
from cifar_jax.networks.pooling import first_winner

_MOST_ROWS = 16
_MOST_CHANNELS = 64
_WARPS = 4  # a thread then has 8 numbers of a full block: 16 bytes in half precision, one load
_MOST_PROGRAMS = 132 * 64 // _WARPS  # an H100's multiprocessors, each of which holds 64 warps


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def norm_gelu(
    x: jax.Array, bias: jax.Array, epsilon: float, pool: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """2x2 max-pooling if ``pool``, batch norm as in training but without a scale, and GELU.

    Args:
        x: ``[B, H, W, C]``; with ``pool``, H and W are even.
        bias: float32 ``[C]``.

    Returns:
        The activations ``[B, H, W, C]`` or ``[B, H/2, W/2, C]``, and the mean and the variance of
        what is normalised, float32 ``[C]``. These two are for the running averages: they have no
        gradient.
    """
    return _forward(x, bias, epsilon, pool)[0]


class _Residuals(NamedTuple):
    """What the backward pass needs; the vectors are float32 ``[C]``.

    Attributes:
        x: what was normalised, ``[R, C]``.
        winner: the pixel that is the maximum of its window, 0 to 3, int8 ``[R, C]``; None without
            a pool.
        rstd: the reciprocal of the standard deviation.
    """

    x: jax.Array
    winner: jax.Array | None
    mean: jax.Array
    rstd: jax.Array
    bias: jax.Array


def _forward(
    x: jax.Array, bias: jax.Array, epsilon: float, pool: bool
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], _Residuals]:
    batch, height, width, channels = x.shape
    dtype, x, winner = x.dtype, x.reshape(-1, channels), None
    if pool:
        height, width = height // 2, width // 2
        grid = _Grid.to_sum(len(x) // 4, channels)
        x, winner, sums = grid.run(
            functools.partial(_pool_and_sums, grid, width),
            [(x, _ANYWHERE)],
            [(dtype, _BLOCK), (jnp.int8, _BLOCK), (jnp.float32, _SUMS)],
        )
    else:
        grid = _Grid.to_sum(len(x), channels)
        (sums,) = grid.run(functools.partial(_sums, grid), [(x, _BLOCK)], [(jnp.float32, _SUMS)])
    mean, square = sums.sum(0) / grid.rows
    variance = jnp.maximum(square - mean * mean, 0)  # nn.BatchNorm's fast variance
    rstd = lax.rsqrt(variance + epsilon)
    y = gelu(((x.astype(jnp.float32) - mean) * rstd + bias).astype(dtype))
    residuals = _Residuals(x, winner, mean, rstd, bias)
    return (y.reshape(batch, height, width, channels), mean, variance), residuals


def _backward(
    epsilon: float, pool: bool, residuals: _Residuals, gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    del epsilon  # is in residuals.rstd
    batch, height, width, channels = gradients[0].shape
    activations = [(residuals.x, _BLOCK), (gradients[0].reshape(-1, channels), _BLOCK)]
    vectors = [(vector, _VECTOR) for vector in (residuals.mean, residuals.rstd, residuals.bias)]
    grid = _Grid.to_sum(len(residuals.x), channels)
    (sums,) = grid.run(
        functools.partial(_gradient_sums, grid), activations + vectors, [(jnp.float32, _SUMS)]
    )
    dbias, product = sums.sum(0)
    vectors += [(dbias, _VECTOR), (product, _VECTOR)]
    grid = _Grid.of_single_blocks(len(residuals.x), channels)
    if residuals.winner is None:
        (dx,) = grid.run(
            functools.partial(_input_gradient, grid),
            activations + vectors,
            [(residuals.x.dtype, _BLOCK)],
        )
        return dx.reshape(batch, height, width, channels), dbias
    (dx,) = grid.run(
        functools.partial(_pixels_gradient, grid, width),
        [(residuals.winner, _BLOCK), *activations, *vectors],
        [(residuals.x.dtype, _ANYWHERE)],
    )
    return dx.reshape(batch, 2 * height, 2 * width, channels), dbias


norm_gelu.defvjp(_forward, _backward)

# What a program gets of an array: its blocks of [R, C]; its channels of [C]; its two sums, of the
# [P, 2, C] for all P programs below each other; or all pixels [4R, C], where it finds its own.
_BLOCK, _VECTOR, _SUMS, _ANYWHERE = "block", "vector", "sums", "anywhere"


class _Grid(NamedTuple):
    """How ``[R, C]`` is divided among the programs of a GPU.

    Attributes:
        rows, channels: R and C.
        block_rows, block_channels: of one block.
        blocks: how many each program takes, one below the other.
    """

    rows: int
    channels: int
    block_rows: int
    block_channels: int
    blocks: int

    @classmethod
    def of_single_blocks(cls, rows: int, channels: int) -> _Grid:
        # A common divisor of a power of two is one too.
        block_rows, block_channels = math.gcd(rows, _MOST_ROWS), math.gcd(channels, _MOST_CHANNELS)
        return cls(rows, channels, block_rows, block_channels, 1)

    @classmethod
    def to_sum(cls, rows: int, channels: int) -> _Grid:
        grid = cls.of_single_blocks(rows, channels)
        programs, beside = grid.shape
        blocks = next(
            n
            for n in range(1, programs + 1)
            if programs % n == 0 and (programs // n * beside <= _MOST_PROGRAMS or n == programs)
        )
        return grid._replace(blocks=blocks)

    @property
    def shape(self) -> tuple[int, int]:
        """Programs below each other, and beside each other."""
        return (
            self.rows // (self.block_rows * self.blocks),
            self.channels // self.block_channels,
        )

    def run(
        self,
        kernel: Callable[..., None],
        inputs: Sequence[tuple[jax.Array, str]],
        outputs: Sequence[tuple[Any, str]],
    ) -> list[jax.Array]:
        """The outputs of ``kernel``, run on all blocks.

        Args:
            inputs: arrays, each with how a program gets it.
            outputs: types, each with how a program gets it.
        """
        each, width = self.block_rows * self.blocks, self.block_channels
        specs = {
            _BLOCK: pl.BlockSpec((each, width), lambda i, j: (i, j)),
            _VECTOR: pl.BlockSpec((width,), lambda i, j: (j,)),
            _SUMS: pl.BlockSpec((1, 2, width), lambda i, j: (i, 0, j)),
            _ANYWHERE: pl.BlockSpec(memory_space=pl.ANY),
        }
        shapes = {
            _BLOCK: (self.rows, self.channels),
            _SUMS: (self.shape[0], 2, self.channels),
            _ANYWHERE: (4 * self.rows, self.channels),
        }
        return pl.pallas_call(
            kernel,
            grid=self.shape,
            in_specs=[specs[how] for _, how in inputs],
            out_specs=[specs[how] for _, how in outputs],
            out_shape=[jax.ShapeDtypeStruct(shapes[how], dtype) for dtype, how in outputs],
            compiler_params=triton.CompilerParams(num_warps=_WARPS),
            interpret=jax.default_backend() == "cpu",  # for tests
        )(*(array for array, _ in inputs))

    def sum_blocks(self, sums: Any, values: Callable[[int], tuple[jax.Array, jax.Array]]) -> None:
        """Write to ``sums`` the sums over all rows of the two ``values(i)`` of each block i."""

        def add(i: int, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            first, second = values(i)
            return totals[0] + first, totals[1] + second

        zeros = jnp.zeros((self.block_rows, self.block_channels), jnp.float32)
        totals = lax.fori_loop(0, self.blocks, add, (zeros, zeros))
        for i, total in enumerate(totals):
            sums[0, i, :] = total.sum(0)

    def block(self, i: int) -> Any:
        """The index of block i in what a program gets as ``_BLOCK``."""
        return pl.ds(i * self.block_rows, self.block_rows), slice(None)

    def pixels(self, width: int) -> Callable[[int], list[tuple[jax.Array, jax.Array]]]:
        """A function of i: the indices of block i's pixels, before pooling, in ``[4R, C]``.

        Four, for the pixels of each window in reading order.

        Args:
            width: columns of an image after pooling.
        """
        start = pl.program_id(0) * self.blocks * self.block_rows
        channel = pl.program_id(1) * self.block_channels + jnp.arange(self.block_channels)

        def of_block(i: int) -> list[tuple[jax.Array, jax.Array]]:
            window = start + i * self.block_rows + jnp.arange(self.block_rows)
            # A row of windows is two rows of the image, each of twice its pooled width.
            first = 2 * window + window // width * 2 * width
            return [
                ((first + down * 2 * width + right)[:, None], channel[None, :])
                for down in (0, 1)
                for right in (0, 1)
            ]

        return of_block


def _sums(grid: _Grid, x: Any, sums: Any) -> None:
    def values(i: int) -> tuple[jax.Array, jax.Array]:
        block = x[grid.block(i)].astype(jnp.float32)
        return block, block * block

    grid.sum_blocks(sums, values)


def _pool_and_sums(grid: _Grid, width: int, pixels: Any, x: Any, winner: Any, sums: Any) -> None:
    pixels_of = grid.pixels(width)

    def values(i: int) -> tuple[jax.Array, jax.Array]:
        corners = [pixels[where] for where in pixels_of(i)]
        pooled = functools.reduce(jnp.maximum, corners)
        x[grid.block(i)] = pooled
        winner[grid.block(i)] = first_winner(corners, pooled)
        pooled = pooled.astype(jnp.float32)
        return pooled, pooled * pooled

    grid.sum_blocks(sums, values)


def _gradient_sums(
    grid: _Grid, x: Any, gradient: Any, mean: Any, rstd: Any, bias: Any, sums: Any
) -> None:
    """Write the sums of the gradient before GELU, and of its product with the normalised ``x``.

    The first is the gradient with respect to the bias.
    """
    vectors = mean[...], rstd[...], bias[...]

    def values(i: int) -> tuple[jax.Array, jax.Array]:
        before, normalised = _before_gelu(x[grid.block(i)], gradient[grid.block(i)], *vectors)
        return before, before * normalised

    grid.sum_blocks(sums, values)


def _before_gelu(
    x: jax.Array, gradient: jax.Array, mean: jax.Array, rstd: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradient before GELU, and the normalised ``x`` without its bias."""
    normalised = (x.astype(jnp.float32) - mean) * rstd
    return gradient.astype(jnp.float32) * gelu_slope(normalised + bias), normalised


def _x_gradient(grid: _Grid, x: Any, gradient: Any, *vectors: Any) -> jax.Array:
    """The gradient with respect to ``x`` (Ioffe and Szegedy, 2015, arXiv:1502.03167, section 3)."""
    mean, rstd, bias, dbias, product = (vector[...] for vector in vectors)
    before, normalised = _before_gelu(x[...], gradient[...], mean, rstd, bias)
    return rstd * (before - (dbias + normalised * product) / grid.rows)


def _input_gradient(grid: _Grid, *refs: Any) -> None:
    *inputs, dx = refs
    dx[...] = _x_gradient(grid, *inputs).astype(dx.dtype)


def _pixels_gradient(grid: _Grid, width: int, winner: Any, *refs: Any) -> None:
    *inputs, dpixels = refs
    dx, winner = _x_gradient(grid, *inputs).astype(dpixels.dtype), winner[...]
    for i, where in enumerate(grid.pixels(width)(0)):
        dpixels[where] = jnp.where(winner == i, dx, jnp.zeros_like(dx))
