"""Batch norm and GELU as one layer, with few passes over memory.

A GPU multiplies so fast that what is left of a step is reading and writing: differentiated as they
come, the two keep the normalised values for the backward pass, and go over their gradient three
times. Here only what comes in is kept, and the backward pass reads it and the gradient twice: for
the two sums that the statistics need, and for the result.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

_BATCH = (0, 1, 2)  # all axes of [B, H, W, C] but the channels

_Statistics = tuple[jax.Array, jax.Array]


def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution's share below x (Hendrycks and Gimpel, arXiv:1606.08415).

    In the form with tanh, which is within 5e-4 of the exact one and takes half the time.
    """
    return x * _share_below(x)


def _share_below(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _gelu_slope(x: jax.Array) -> jax.Array:
    share = _share_below(x)
    return share + x * share * (1 - share) * math.sqrt(8 / math.pi) * (1 + 0.134145 * x**2)


class BatchNormGelu(nn.Module):
    """GELU of batch norm, whose scale is 1: ``[B, H, W, C]`` to the same.

    Attributes:
        train: whether by the batch's statistics, which then are averaged into the running ones.
        momentum: of the running statistics.
        epsilon: added to the variance.
        axis_name: the pmap axis over which statistics are taken.
    """

    train: bool
    momentum: float
    epsilon: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        if not self.train:
            normalised = (x - mean.value) * lax.rsqrt(var.value + self.epsilon) + bias
            return gelu(normalised).astype(x.dtype)
        axis_name = None if self.is_initializing() else self.axis_name
        y, statistics = _by_the_batch(x, bias, self.epsilon, axis_name)
        if not self.is_initializing():
            for running, of_batch in zip((mean, var), statistics, strict=True):
                kept = self.momentum * running.value
                running.value = kept + (1 - self.momentum) * of_batch
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _by_the_batch(
    x: jax.Array, bias: jax.Array, epsilon: float, axis_name: str | None
) -> tuple[jax.Array, _Statistics]:
    """The layer's output, and the mean and variance of each channel, which have no gradient."""
    return _forward(x, bias, epsilon, axis_name)[0]


def _forward(x: jax.Array, bias: jax.Array, epsilon: float, axis_name: str | None) -> Any:
    wide = x.astype(bias.dtype)
    # In one pass; in float32 what cancels is far below what a step changes.
    mean, mean_of_squares = _means((wide, wide * wide), axis_name)
    var = jnp.maximum(mean_of_squares - mean**2, 0)
    factor = lax.rsqrt(var + epsilon)
    y = gelu((wide - mean) * factor + bias).astype(x.dtype)
    return (y, (mean, var)), (x, bias, mean, factor)


def _backward(epsilon: float, axis_name: str | None, kept: Any, cotangents: Any) -> Any:
    """Ioffe and Szegedy, 2015, arXiv:1502.03167, section 3, the gradients put together."""
    x, bias, mean, factor = kept
    normalised = (x.astype(bias.dtype) - mean) * factor
    gradient = cotangents[0].astype(bias.dtype) * _gelu_slope(normalised + bias)
    along_one, along_x = _means((gradient, gradient * normalised), axis_name)
    of_x = factor * (gradient - along_one - normalised * along_x)
    return of_x.astype(x.dtype), gradient.sum(_BATCH)


def _means(values: tuple[jax.Array, ...], axis_name: str | None) -> list[jax.Array]:
    means = [x.mean(_BATCH) for x in values]
    return lax.pmean(means, axis_name) if axis_name else means


_by_the_batch.defvjp(_forward, _backward)
