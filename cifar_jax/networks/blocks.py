"""Layers shared by the networks, besides Flax's own: functions of ``[B, H, W, C]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from cifar_jax.networks.convolution import conv3x3
from cifar_jax.networks.winograd import Padding

LayerFunction = Callable[[jax.Array], jax.Array]


class Conv(nn.Module):
    """A 3x3 convolution of stride 1: ``[B, H, W, C]`` -> ``[B, H, W, features]``.

    It has the parameters of ``flax.linen.Conv``, and is faster.

    Attributes:
        padding, paired: as in :func:`cifar_jax.networks.convolution.conv3x3`.
        dtype: of the activations, if not that of the parameters.
    """

    features: int
    padding: Padding = ((1, 1), (1, 1))
    use_bias: bool = True
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    paired: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = conv3x3(x, kernel, self.padding, self.paired)
        return y if bias is None else y + bias


def residual(layers: list[LayerFunction]) -> LayerFunction:
    """``x + branch(x)``, where the branch is ``layers`` in sequence."""
    branch = nn.Sequential(layers)

    def add(x: jax.Array) -> jax.Array:
        return x + branch(x)

    return add


def global_max_pool(x: jax.Array) -> jax.Array:
    """``[B, H, W, C]`` -> ``[B, C]``, for any H and W."""
    return x.max(axis=(1, 2))


def global_average_pool(x: jax.Array) -> jax.Array:
    """``[B, H, W, C]`` -> ``[B, C]``, for any H and W."""
    return x.mean(axis=(1, 2))
