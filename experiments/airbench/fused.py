"""Airbench with one operation for each batch norm, the GELU after it and the pool before it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from airbench.kernels import norm_gelu
from cifar_jax.networks.airbench import Airbench
from cifar_jax.networks.blocks import LayerFunction
from cifar_jax.networks.pooling import whole_windows


class FusedAirbench(Airbench):
    """``Airbench``, with the same variables, trained by the kernels of kernels.py.

    They take the statistics of batch norm over one device: ``axis_name`` has no effect on them.
    """

    def norm_gelu(self, name: str, *, train: bool, pool: bool = False) -> list[LayerFunction]:
        if not train:
            return super().norm_gelu(name, train=train, pool=pool)
        return [NormGelu(pool, self.batch_norm_epsilon, self.batch_norm_momentum, name=name)]

    def classifier(self) -> list[LayerFunction]:
        # XLA for a GPU might compute the last activations again, and round them otherwise, for the
        # gradient of the global maximum. That looks for the activation that equals the maximum:
        # finding none, it would divide by 0. XLA for a CPU fuses across this barrier.
        return [lax.optimization_barrier, *super().classifier()]


class NormGelu(nn.Module):
    """:func:`airbench.kernels.norm_gelu`, with the variables of ``nn.BatchNorm``.

    Attributes:
        pool: whether it pools first.
        epsilon, momentum: as in ``nn.BatchNorm``.
    """

    pool: bool
    epsilon: float
    momentum: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        bias = self.param("bias", nn.initializers.zeros, shape)
        running = [
            self.variable("batch_stats", "mean", jnp.zeros, shape),
            self.variable("batch_stats", "var", jnp.ones, shape),
        ]
        x = whole_windows(x) if self.pool else x
        y, *of_batch = norm_gelu(x, bias, self.epsilon, self.pool)
        for average, value in zip(running, of_batch, strict=True):
            average.value = self.momentum * average.value + (1 - self.momentum) * value
        return y
