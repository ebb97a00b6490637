"""The network of the record for 94 % on CIFAR-10 (https://github.com/KellerJordan/cifar10-airbench).

Jordan, 2024, arXiv:2404.00498. Its first convolution whitens the images and is not trained; its
activation is GELU. Where this differs from Flax's own layers, it is for speed on a GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax

from cifar_jax.data.dataset import ImageShape
from cifar_jax.layout import TorchLayout
from cifar_jax.networks.blocks import Conv, LayerFunction, global_max_pool, residual
from cifar_jax.networks.convolution import paired_conv
from cifar_jax.networks.initializers import (
    WHITENING,
    WHITENING_SIDE,
    partly_identity,
    uniform,
    unit_std,
)
from cifar_jax.networks.pooling import max_pool


class Airbench(nn.Module):
    """Whitening, stages of two convolutions, the first of them pooled, and a linear classifier.

    A run sets the kernel of the whitening from its images
    (:func:`cifar_jax.networks.initializers.whiten`).

    Attributes:
        widths: channels of its stages.
        deep: a third convolution in each stage, and a residual around the last two: the layers of
            its author's network for 96 %.
        axis_name: the pmap axis over which batch norm takes its statistics.
        dtype: of activations, where it is not that of the parameters; logits are of theirs.
    """

    batch_norm_momentum: ClassVar[float] = 0.6  # as a run has only some 200 steps
    batch_norm_epsilon: ClassVar[float] = 1e-12

    num_classes: int
    widths: Sequence[int] = (64, 256, 256)
    deep: bool = False
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        def conv(features: int, below: int = 1, right: int = 1, paired: bool = False) -> Conv:
            return Conv(
                features,
                padding=((1, below), (1, right)),
                use_bias=False,
                kernel_init=partly_identity,
                paired=paired,
                dtype=self.dtype,
            )

        norms = (f"BatchNorm_{i}" for i in itertools.count())
        height, width = (size - WHITENING_SIDE + 1 for size in x.shape[1:3])
        layers: list[LayerFunction] = [Whitening(self.dtype, name=WHITENING), gelu]
        for i, features in enumerate(self.widths):
            below, right = map(_padding_before_pool, (height, width))
            layers.append(conv(features, below, right, paired=i == 0))
            layers += self.norm_gelu(next(norms), train=train, pool=True)
            rest: list[LayerFunction] = [conv(features), *self.norm_gelu(next(norms), train=train)]
            if self.deep:
                rest += [conv(features), self.batch_norm(next(norms), train=train)]
                rest = [residual(rest), gelu]
            layers += rest
            height, width = height // 2, width // 2
        return nn.Sequential([*layers, *self.classifier()])(x)

    def norm_gelu(self, name: str, *, train: bool, pool: bool = False) -> list[LayerFunction]:
        """The layers after a convolution: MaxPool 2 if wanted, batch norm, GELU.

        Args:
            name: of the norm, in ``params`` and ``batch_stats``.
        """
        return [*([max_pool] if pool else []), self.batch_norm(name, train=train), gelu]

    def batch_norm(self, name: str, *, train: bool) -> nn.BatchNorm:
        """Batch norm with a bias and without a scale."""
        return nn.BatchNorm(
            use_running_average=not train,
            use_scale=False,
            momentum=self.batch_norm_momentum,
            epsilon=self.batch_norm_epsilon,
            axis_name=self.axis_name,
            dtype=self.dtype,
            name=name,
        )

    def classifier(self) -> list[LayerFunction]:
        """The layers from the last activations to the logits."""

        def scale(x: jax.Array) -> jax.Array:
            return x / self.widths[-1]

        head = nn.Dense(self.num_classes, use_bias=False, kernel_init=unit_std)
        return [global_max_pool, head, scale]

    def torch_layout(self, image_shape: ImageShape) -> TorchLayout:
        """The names of these layers in its author's script."""
        del image_shape  # nothing is flattened but [B, 1, 1, C]
        names = {WHITENING: "whiten"}
        convs = 3 if self.deep else 2
        for i, (stage, j) in enumerate(itertools.product(range(len(self.widths)), range(convs))):
            names[f"Conv_{i}"] = f"layers.{stage + 1}.conv{j + 1}"
            names[f"BatchNorm_{i}"] = f"layers.{stage + 1}.norm{j + 1}"
        return TorchLayout({**names, "Dense_0": "head"}, None, scaled_norms=False)


class Whitening(nn.Module):
    """The first convolution: ``[B, H, W, C]`` -> ``[B, H-1, W-1, 8C]``.

    Its kernel, which a run sets, is not trained; its bias is.

    Attributes:
        dtype: as in :class:`Airbench`.
    """

    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        side, channels = WHITENING_SIDE, x.shape[-1]
        fan_in = side * side * channels
        shape = (side, side, channels, 2 * fan_in)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", uniform(fan_in), (2 * fan_in,))
        x, kernel, bias = promote_dtype(x, lax.stop_gradient(kernel), bias, dtype=self.dtype)
        y = paired_conv(x, kernel)
        # The gradient of the bias is thus summed over images first, then over pixels. A single sum
        # with so few columns would take a GPU three times as long.
        return y + lax.optimization_barrier(jnp.broadcast_to(bias, y.shape[1:]))


def _padding_before_pool(size: int) -> int:
    """The padding below, or to the right, of a convolution whose ``size`` rows are then pooled.

    0 if ``size`` is odd: the pool would drop the last row, so it is not computed.
    """
    return 0 if size % 2 and size > 1 else 1


_GELU_SCALE, _GELU_CUBE = math.sqrt(8 / math.pi), 0.044715


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """``x`` times the share of the normal distribution below it, to within 5e-4.

    Hendrycks and Gimpel, 2016, arXiv:1606.08415: their tanh approximation, written as a sigmoid,
    since GPUs compute exp fast.
    """
    return x * gelu_share(x)


def gelu_share(x: jax.Array) -> jax.Array:
    """``gelu(x) / x``: the share of ``x`` that passes."""
    return nn.sigmoid(_GELU_SCALE * (x + _GELU_CUBE * x**3))


def gelu_slope(x: jax.Array) -> jax.Array:
    """The derivative of :func:`gelu`."""
    share = gelu_share(x)
    slope = _GELU_SCALE * (1 + 3 * _GELU_CUBE * x * x)
    return share + x * share * (1 - share) * slope


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Only x is kept for the backward pass, which recomputes the rest: memory traffic is what costs
    # time here. Without the barrier XLA would keep the exponential too.
    return gelu(x), lax.optimization_barrier(x)


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (gradient * gelu_slope(x),)


gelu.defvjp(_gelu_forward, _gelu_backward)
