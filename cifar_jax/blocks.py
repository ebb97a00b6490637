"""Layers that networks here share, beside Flax's: functions of ``[B, H, W, C]``."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax

Layer = Callable[[jax.Array], jax.Array]


def residual(layers: list[Layer]) -> Layer:
    """``x + branch(x)``, where the branch is the ``layers`` one after the other."""
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
